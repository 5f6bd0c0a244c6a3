"""The errors that a user may meet. Each is one clear line; the command line turns its class into an exit status."""


class DanceGRPOError(Exception):
    """Base of all; `exit_status` is what `dancegrpo` exits with."""

    exit_status = 3


class WorkflowError(DanceGRPOError):
    """The workflow, or what the user asked of it, is wrong; nothing was loaded or trained.

    `problems` holds one line each: which node (id and title), which input, what was found, what is accepted.
    """

    exit_status = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class RunError(DanceGRPOError):
    """A fault while the workflow ran: one line, the last checkpoint is kept."""


class Interrupted(DanceGRPOError):
    """The user asked to stop (Ctrl-C, the stop button)."""

    exit_status = 130
