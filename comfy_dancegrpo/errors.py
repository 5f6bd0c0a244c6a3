"""The errors that a user may meet. Each is one clear line; the command line turns its class into an exit status."""


class DanceGRPOError(Exception):
    """Base of all; `exit_status` is what `dancegrpo` exits with."""

    exit_status = 3
    labelled = False

    def at(self, label: str) -> "DanceGRPOError":
        """Puts in front which node it happened in (`node 12 "Title"`), unless a label is there already; returns itself."""
        if not self.labelled and not str(self).startswith(label.partition('"')[0]):
            self.args = ("\n".join(f"{label}: {line}" for line in str(self).splitlines()),)
        self.labelled = True
        return self


class WorkflowError(DanceGRPOError):
    """The workflow, or what the user asked of it, is wrong; nothing was loaded or trained.

    `problems` holds one line each: which node (id and title), which input, what was found, what is accepted.
    """

    exit_status = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))

    @property
    def problems(self) -> list[str]:
        return str(self).splitlines()


class RunError(DanceGRPOError):
    """A fault while the workflow ran: one line, the last checkpoint is kept."""


class OutOfMemory(RunError):
    """A fault of that kind: the memory of a device did not suffice."""


class Interrupted(DanceGRPOError):
    """The user asked to stop (Ctrl-C, the stop button)."""

    exit_status = 130


def is_stop(error: BaseException) -> bool:
    """Whether the user asked to stop; ComfyUI's own stop button raises a class of its own."""
    return isinstance(error, Interrupted) or type(error).__name__ == "InterruptProcessingException"
