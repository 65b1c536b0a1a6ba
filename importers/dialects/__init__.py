"""One module for each project, or each of its forms, whose recipes are read: what its options mean here. See
`importers/recipe.py`.
"""

from __future__ import annotations

import dataclasses

from importers.dialects import (
    causal_forcing,
    causvid,
    fastgen,
    fastvideo,
    fastvideo_modular,
    fastvideo_nested,
    longlive,
    longlive2,
    rcm,
    self_forcing,
    simpletuner,
)

# the first form that fits counts: a modular file has sections `training` too
_FASTVIDEO = dataclasses.replace(
    fastvideo.BIDIRECTIONAL,
    forms=(fastvideo_modular.MODULAR, fastvideo_nested.NESTED_CAUSAL, fastvideo_nested.NESTED, fastvideo.CAUSAL),
)
_PLAIN = (self_forcing, causal_forcing, longlive, longlive2, causvid, simpletuner, fastgen, rcm)
DIALECTS = {dialect.name: dialect for dialect in (_FASTVIDEO, *(module.DIALECT for module in _PLAIN))}
