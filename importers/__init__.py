"""Recipes of other projects as mappings of our keys. They stand on utils alone: the caller checks the mapping
against the schema.

`read` makes flat options of a file, `dialects` say what each option means, `translate` applies that, and `report` shows
what came of it.
"""
