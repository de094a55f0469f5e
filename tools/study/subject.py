"""What a study is about: which variants, at which sizes, and how their results are told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.variants import Variant

if TYPE_CHECKING:
    from megatron_moe.tools.study.compare import Study
    from megatron_moe.tools.study.findings import Finding

CONTROL = "control"


@dataclass(frozen=True)
class Column:
    """One column of the table on the console.

    Args:
        heading: Above it.
        cell: Gives the text for a variant, by its name.
    """

    heading: str
    cell: Callable[[Study, Plan, str], str]


def mean_column(heading: str, measure: str, pattern: str) -> Column:
    """A column with the mean of a measure, by a format with one place."""

    def cell(study: Study, _plan: Plan, name: str) -> str:
        return pattern.format(study.measured(name, measure).mean)

    return Column(heading, cell)


@dataclass(frozen=True)
class Panel:
    """One column of the picture.

    Args:
        measure: Field of a point.
        title: Above the column.
        percent: Whether the axis shows percent.
        compared: Draw the difference from each variant's own :data:`CONTROL`, or from the variant
            of this name; "" draws the measure itself.
    """

    measure: str
    title: str
    percent: bool = False
    compared: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One study.

    Args:
        name: Of the command, and of its folder in ``runs``.
        says: What the command does.
        noun: What the variants are, in the plural.
        variants: All of them by name; the first is the baseline.
        full: Sizes of a full run.
        quick: Of a quick one.
        quick_says: What the quick one is.
        measures: Of a run, for the CSV; the first is the loss.
        columns: Of the table on the console.
        caption: Below that table.
        further: More columns of the CSV for a variant.
        panels: Of the picture.
        findings: Says in words what came out.
    """

    name: str
    says: str
    noun: str
    variants: Mapping[str, Variant]
    full: Plan
    quick: Plan
    quick_says: str
    measures: tuple[str, ...]
    columns: tuple[Column, ...]
    caption: str
    further: Callable[[Study, Plan, str], dict[str, float | None]]
    panels: tuple[Panel, ...]
    findings: Callable[[Study, Plan], list[Finding]]

    @property
    def baseline(self) -> str:
        """The variant that is drawn in every row it belongs to, in black."""
        return next(iter(self.variants))

    @property
    def families(self) -> tuple[str, ...]:
        """Rows of the picture, sections of the table."""
        return tuple(dict.fromkeys(variant.family for variant in self.variants.values()))

    def with_controls(self, names: Collection[str]) -> list[str]:
        """The variants of ``names`` and those that they are compared with, in order."""
        wanted: set[str] = set()
        for variant in (self.variants[name] for name in names):
            wanted |= {variant.name, variant.against, variant.unbalanced} - {""}
        # A control has a control: sigmoid without balancing is itself compared with softmax.
        return (
            [name for name in self.variants if name in wanted]
            if wanted == {*names}
            else self.with_controls(wanted)
        )

    def row_of(self, family: str, names: list[str]) -> list[str]:
        """Names to draw together: the family's, with those it is compared with, in order."""
        mine = [name for name in names if self.variants[name].family == family]
        wanted = {*mine, *(self.variants[name].against for name in mine)}
        return [name for name in names if name in wanted] if mine else []
