"""The errors Secateur raises for its users. Each message says what was wrong, where, and how to fix it."""


class SecateurError(Exception):
    """Base of every error that is told in one message.

    Attributes:
        exit_code: of the command line; 2 stands for input that is wrong.
    """

    exit_code = 2


class CheckpointError(SecateurError):
    """A model folder or hub name that cannot be loaded or written."""


class ParityError(CheckpointError):
    """What was written is not what was meant. A defect, not the user's mistake: the command line exits with code 1."""

    exit_code = 1


class StreamingError(CheckpointError):
    """A checkpoint that can be cut, but only after it was loaded whole."""


class DataError(SecateurError):
    """A text file or corpus that cannot be read, or holds too little."""


class DiscoveryError(SecateurError):
    """A model whose coupled structures cannot be traced."""


class BudgetError(SecateurError):
    """A sparsity that is out of range or cannot be reached."""


class PlanError(SecateurError):
    """A plan that does not fit the model, or a cut that the model's class cannot express."""


class KnowledgeError(SecateurError):
    """An analysis that cannot be made, read or gone on with, or that belongs to another model."""


class EvaluationError(SecateurError):
    """Tasks that are not known, cannot be run here, or whose answers so far belong to another model."""


class ReportError(SecateurError):
    """Results that cannot be read or do not follow their schema, or a report that cannot be written."""


class NonFiniteError(SecateurError):
    """A loss or score that is NaN or infinite; names the parameter."""


class RecipeError(SecateurError):
    """A recipe that does not follow the schema."""


class SweepError(SecateurError):
    """Runs of a sweep that failed, the others being done; the exit code is 1 if one of them met a defect."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ProcessError(SecateurError):
    """A process that was killed or broke off. Not the user's mistake: the command line exits with code 1."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What another library's error says, without its further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """All of what another library's error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
