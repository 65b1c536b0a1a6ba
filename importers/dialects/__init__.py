"""One module for each project whose recipes are read: what its options mean here. See `importers/recipe.py`."""

from __future__ import annotations

from importers.dialects import self_forcing

DIALECTS = {module.DIALECT.name: module.DIALECT for module in (self_forcing,)}
