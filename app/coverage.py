"""Everything in the workbench that implements a paper, from every floor."""

from __future__ import annotations

from workbench.lab.catalogue import Coverage, Declaration, coverage, gather

# kernels know nothing of papers' names; the registry of models already names the paper of each model.
PACKAGES = ("workbench", "models", "probes", "case_studies", "app")


def all_declarations() -> list[Declaration]:
    """Declarations of every floor, and one per registered model that names its paper.

    Imports the modules that declare something. Raises UnknownPaper for a wrong slug.
    """
    from models.registry import list_models

    declared = gather(PACKAGES)
    named = {(declaration.slug, declaration.name) for declaration in declared if declaration.kind == "model"}
    registered = [
        Declaration(record.paper, "model", record.name, module="models.registry")
        for record in list_models()
        if record.paper and (record.paper, record.name) not in named
    ]
    return [*declared, *registered]


def full_coverage() -> list[Coverage]:
    """Every paper of the catalogue with what implements it."""
    return coverage(all_declarations())
