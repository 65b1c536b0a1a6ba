"""Recipes of other projects as mappings of our keys. They stand on utils alone: whoever calls them checks the mapping
against the schema.
"""
