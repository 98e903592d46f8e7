"""The errors Secateur raises for its users. Each message says what was wrong, where, and how to fix it."""


class SecateurError(Exception):
    """Base of every error caused by input rather than by a defect; the command line exits with code 2 on it."""


class CheckpointError(SecateurError):
    """A model folder or hub name that cannot be loaded or written."""


class DataError(SecateurError):
    """A text file or corpus that cannot be read, or holds too little."""


class DiscoveryError(SecateurError):
    """A model whose coupled structures cannot be traced."""


class BudgetError(SecateurError):
    """A sparsity that is out of range or cannot be reached."""


class PlanError(SecateurError):
    """A plan that does not fit the model, or a cut that the model's class cannot express."""


class NonFiniteError(SecateurError):
    """A loss or score that is NaN or infinite; names the parameter."""


class RecipeError(SecateurError):
    """A recipe that does not follow the schema."""


def first_line(error: BaseException) -> str:
    """What another library's error says, without its further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
