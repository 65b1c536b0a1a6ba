"""Recipes of other projects as mappings of our keys. They stand on utils alone: the caller checks the mapping
against the schema.
"""
