"""What a technique is: options, needs, two hooks.

A technique's file holds one class and ends with `TECHNIQUE = ThatClass`. Its class docstring is its manual: the idea,
the paper, each option with unit, range and default. Torch and other heavy libraries are imported inside the hooks, so
that a recipe can be checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from infopt.layers import grid, sparsity
from infopt.layers.grid import Grid, ScaleDType
from infopt.needs import Needs
from infopt.protocols import Context, Machine, Prediction, Shapes

__all__ = ["GridOptions", "GridTechnique", "Modules", "Needs", "Options", "PruneOptions", "PruneTechnique", "Technique"]

Modules = Annotated[tuple[str, ...], Field(strict=False)]
"""Names of modules, as globs over dotted names or as last parts; a list in YAML."""

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle
    from infopt.model.plan import LoadPlan


class Options(BaseModel):
    """Base of every technique's options: frozen, unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def is_set(self, name: str) -> bool:
        """Whether the option differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class Technique:
    """Base of all techniques. Subclasses set the class attributes and override `plan`, `apply` or both."""

    Options: ClassVar[type[Options]] = Options
    needs: Needs = Needs()
    """Of the technique; an instance may narrow it to what its options need."""
    neutral: ClassVar[dict[str, Any] | None] = None
    """Options under which the model must not change at all, or None when there are none."""
    reload_tolerance: float = 0.0
    """Largest allowed |logit| change after save and reload; above 0 the docstring says why. An instance may set its own."""
    arithmetic: str | None = None
    """What its layers multiply in, where that is not the model's dtype. An instance may set its own."""
    at_load: ClassVar[bool] = False
    """True when there is no loadable file format: the artifact stores the weights from before this step, and the
    step runs again whenever the artifact is opened."""

    reopens_always: ClassVar[bool] = False
    """True when `reopen` has to be done under the native engine too."""

    is_record: ClassVar[bool] = False
    """True when the model answers as before: what the step writes is for other engines."""

    keeps_vocabulary: ClassVar[bool] = True
    """False when its model has other tokens, or other numbers for them: `apply` then returns the tokenizer for them, and what
    follows gets its calibration text in these."""

    holds_against_reference: bool = False
    """True when it compares tokens of the model with those of the one that the recipe started from. An instance sets its own."""

    remark: str | None = None
    """What every report of a model that it made says. An instance may set its own."""

    packs: bool = False
    """True when its weights are packed afterwards, so that no later step can change them. An instance may set its own."""

    walks: bool = False
    """True when it brings one decoder block at a time to the device, wherever the model lies. An instance may set its own."""

    models: tuple[str, ...] = ()
    """References of other models that it reads. An instance sets its own."""

    data: str | None = None
    """A file of rows that it learns from. An instance sets its own."""

    def __init__(self, options: Any) -> None:
        self.options = options
        #: The recipe's `cache.dtype` and the device asked for, for `check`.
        self.cache_dtype = self.device = "auto"
        #: Tokens of the recipe's calibration text, for `predict`.
        self.calibration_tokens = 0
        #: How many windows these are.
        self.calibration_samples = 0
        #: Bytes of a parameter of the model as it is opened, and this machine's measured peaks: for `check` and `reshape`, which
        #: know neither otherwise. None where nobody says.
        self.element_bytes: Callable[[], float] | None = None
        self.machine: Callable[[], Machine] | None = None

    def check(self, shapes: Shapes, path: str) -> None:
        """Refuses options that this model's shapes do not allow. `path` is the step's place in the recipe.

        Raises RecipeError.
        """

    def reshape(self, shapes: Shapes) -> Shapes:
        """The shapes that this step leaves of a model of `shapes`, which `check` accepted."""
        return shapes

    def plan(self, plan: LoadPlan) -> LoadPlan:
        """Before weights are read. Pure."""
        return plan

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        """After weights are read. Consumes `bundle`."""
        return bundle

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """What this step will cost on `machine`, for `optimize --dry-run`."""
        return before

    def reopen(self, bundle: Bundle) -> Bundle:
        """After an artifact of this technique was loaded the plain way: swap in the layers that run it faster.

        The native engine packs what was stored, so there it is left undone, unless `reopens_always`.
        """
        return bundle


class GridOptions(Options):
    """Which layers, and the integers that their weights become."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=64, ge=8)
    symmetric: bool = True
    scale_dtype: ScaleDType = "auto"
    ignore: Modules = ("lm_head",)


class GridTechnique(Technique):
    """Base of techniques that round linear layers to one grid and store them as compressed-tensors.

    Subclasses override `apply`, and `_grid` where their options are not `GridOptions`; these have `ignore`.
    """

    needs = Needs(modules=("compressed_tensors",))
    packs = True
    neutral: ClassVar = {"ignore": ["*"]}

    @property
    def _grid(self) -> Grid:
        o = self.options
        return Grid(o.bits, o.group_size, o.scale_dtype, o.symmetric)

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check(self._grid, shapes, self.options.ignore, path)
        if self.walks:
            grid.check_inside_blocks(shapes, self.options.ignore, path)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        return grid.predict(self._grid, grid.chosen(shapes, self.options.ignore), shapes, before, machine)

    def reopen(self, bundle: Bundle) -> Bundle:
        from infopt.layers import packing

        packing.open_packed(bundle.model)
        return bundle


class PruneOptions(Options):
    """Which weights of which layers become zero."""

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    pattern: Literal["2:4", "4:8"] | None = None
    ignore: Modules = ("lm_head",)


class PruneTechnique(Technique):
    """Base of techniques that set weights of linear layers to zero. Subclasses override `apply`; options are `PruneOptions`."""

    needs = Needs(modules=("compressed_tensors",))
    neutral: ClassVar = {"ignore": ["*"]}
    remark = sparsity.REMARK
    options: PruneOptions

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)
        if self.walks:
            grid.check_inside_blocks(shapes, self.options.ignore, path)
        sparsity.check(shapes, self.options.sparsity, self.options.pattern, self.options.ignore, path, self.compared)

    def compared(self, rows: int, inputs: int) -> int:
        """How many weights of a layer are held against each other, of which the share goes."""
        return rows * inputs

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        rate = machine.read_bytes_per_s
        weights = sum(out * inner for out, inner in grid.chosen(shapes, self.options.ignore).values())
        return replace(before, seconds=weights * grid.TRAFFIC_BYTES / rate if rate else None)
