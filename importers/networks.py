"""Models that recipes name: their geometry here, and where their weights are."""

from __future__ import annotations

from importers.recipe import Carry, Recipe, Rule

NETWORKS = ("student", "teacher", "critic")
# by what a model's name holds, the first that fits: (parts of the name, geometry)
PRESETS = (
    (("i2v", "a14b"), "i2v-a14b"), (("i2v", "14b"), "i2v-14b"), (("a14b",), "a14b"), (("14b",), "14b"),
    (("1.3b",), "1.3b"), (("1pt3b",), "1.3b"), (("5b",), "5b"),
)  # fmt: skip
# models by their own repository's name, which recipes use for a folder beside the code
REPOSITORIES = (
    "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P", "Wan2.2-TI2V-5B",
    "Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B",
)  # fmt: skip


def preset_of(name: str) -> str | None:
    """The geometry that a model's name or path tells; None if it tells none."""
    return next((preset for parts, preset in PRESETS if all(part in name.lower() for part in parts)), None)


def weights_of(name: str) -> str:
    """Where a named model's weights are: the Hub's repository in Diffusers' layout, which holds encoder and VAE too,
    for Wan's own names; any other name is a path or a repository as it stands."""
    last = name.rstrip("/").rpartition("/")[2]
    return f"Wan-AI/{last}-Diffusers" if last in REPOSITORIES else name


def put_model(recipe: Recipe, network: str, name: str) -> None:
    """Gives a network the model of this name, and its weights where no file of weights is named."""
    file = recipe.staged.get("files", {}).get(network)
    recipe.set(f"{network}.init", file or weights_of(name))
    if (size := preset_of(name) or recipe.staged.get("preset")) is not None:
        recipe.set(f"{network}.preset", size)
    else:
        recipe.refused.append(f"{network}: the name {name!r} does not tell its size: give --preset 1.3b, 14b, ...")
    if file is None and weights_of(name) != name:
        recipe.notes[f"{network}.init"] = f"the Hub's repository of {name}, in Diffusers' layout"


def model(network: str) -> Rule:
    """The rule of a model's name or path: the geometry by the size in it, the weights by itself."""
    return Rule((f"{network}.preset", f"{network}.init"), lambda r, v: put_model(r, network, _name(v)))


def weights(network: str) -> Rule:
    """The rule of a file with a network's weights, which count before those of its model; none says nothing."""

    def carry(recipe: Recipe, value: object) -> None:
        if value:
            recipe.staged.setdefault("files", {})[network] = _name(value)
            recipe.set(f"{network}.init", value)
            recipe.notes.pop(f"{network}.init", None)

    return Rule((f"{network}.init",), carry)


def base() -> Rule:
    """The rule of one model that all networks start from, where no option names theirs: see `spread_base`."""
    keys = tuple(f"{name}.{key}" for name in NETWORKS for key in ("preset", "init"))
    carry: Carry = lambda r, v: r.staged.update(base=_name(v))  # noqa: E731
    return Rule((*keys, "data.text.encoder", "data.vae.path"), carry)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a model's name or path is text")
    return value


def spread_base(recipe: Recipe, default: str | None = None) -> None:
    """Gives the staged `base`, or else this model, to the networks of the recipe whose model no option names."""
    name = recipe.staged.get("base") or default
    for network in NETWORKS:
        if name is not None and recipe.get(network) is not None and recipe.get(f"{network}.preset") is None:
            put_model(recipe, network, name)
