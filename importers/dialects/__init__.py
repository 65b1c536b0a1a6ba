"""One module for each project, or each of its forms, whose recipes are read: what its options mean here. See
`importers/recipe.py`.
"""

from __future__ import annotations

import dataclasses

from importers.dialects import fastgen, fastvideo, fastvideo_modular, fastvideo_nested, rcm, self_forcing, simpletuner

# the first form that fits counts: a modular file has sections `training` too
_FASTVIDEO = dataclasses.replace(
    fastvideo.BIDIRECTIONAL,
    forms=(fastvideo_modular.MODULAR, fastvideo_nested.NESTED_CAUSAL, fastvideo_nested.NESTED, fastvideo.CAUSAL),
)
DIALECTS = {
    dialect.name: dialect
    for dialect in (self_forcing.DIALECT, _FASTVIDEO, simpletuner.DIALECT, fastgen.DIALECT, rcm.DIALECT)
}
