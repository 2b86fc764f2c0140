"""Errors of the case studies. Each names the study, the claim or the field, and suggests the nearest right name."""


class StudyError(ValueError):
    """A study cannot be found, read or run, or it returned something that decides nothing."""


class UnknownStudy(StudyError, LookupError):
    """No study of that name."""


class ClaimsError(StudyError):
    """`claims.toml` is malformed; the message names the file, the claim and the field."""


class StudyBusy(StudyError):
    """Another process works on the same study in the same runs folder."""
