"""Published analyses, one folder each: what a paper claims, the measurement that decides it, and what came out.

    from case_studies import list_studies, run_study

    result = run_study("linear_attention_regression", tier="smoke")
    print(result)

docs/case-studies.md says how to add one. The names below load on first use.
"""

from workbench.lazy import lazy_names

_HOME = {
    "run_study": "harness.running",
    "list_studies": "harness.discovery",
    "find_study": "harness.discovery",
    "study_problems": "harness.discovery",
    "study_results": "harness.results",
    "known_results": "harness.shipped",
    "Study": "harness.claims",
    "Claim": "harness.claims",
    "Context": "harness.context",
    "SeedResults": "harness.context",
    "Sample": "harness.evidence",
    "NotRun": "harness.evidence",
    "StudyResult": "harness.results",
    "ClaimResult": "harness.results",
    "StudyError": "harness.errors",
}

__all__ = sorted(_HOME)

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
