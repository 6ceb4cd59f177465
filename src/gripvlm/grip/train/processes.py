"""The processes of one run: they begin alike, and an error of one ends all of them with the same message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from gripvlm.errors import GripError, TrainError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class EndedTogether(TrainError):
    """An error that every process of a run raises, with the same text; it is enough that the first one prints it."""


class Processes:
    """Those that `accelerate launch` or torchrun started, or one alone.

    Every method but the properties must be called by all of them, in the same order.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count, self.rank = accelerator.num_processes, accelerator.process_index

    @property
    def first(self) -> bool:
        """Whether this process is the one that reads and writes the run's folder."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returned here, once every process has done its own; raises as `everyone`."""
        kept: list[T] = []
        self.everyone(lambda: kept.append(work()))
        return kept[0]

    def everyone(self, work: Callable[[], T]) -> list[T]:
        """What `work` returned in each process, in the order of their ranks.

        `work` itself must not wait for another process, which may have failed.

        Raises:
            EndedTogether: it raised in one of them, with the text of the first that did; where there is one process
                alone, the error itself.
        """
        error: Exception | None = None
        value: Any = None
        try:
            value = work()
        except Exception as caught:  # noqa: BLE001  (whatever it is, the others must hear of it)
            error = caught
        if self.count == 1:
            if error is not None:
                raise error
            return [value]
        values = self.gather((value, None if error is None else _text(error)))
        failed = [(rank, text) for rank, (_, text) in enumerate(values) if text is not None]
        if failed:
            # A mistake of this package or of a user's function: its traceback is what helps.
            if error is not None and not isinstance(error, (GripError, OSError, torch.OutOfMemoryError)):
                raise error
            rank, text = failed[0]
            raise EndedTogether(f"process {rank} of {self.count}: {text}") from error
        return [value for value, _ in values]

    def gather(self, value: T) -> list[T]:
        """The value of each process, in the order of their ranks."""
        from accelerate.utils import gather_object

        with _others():
            values: list[T] = gather_object([value])
        return values

    def broadcast(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        with _others():
            held: list[T] = broadcast_object_list([value], from_process=0)
        return held[0]

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Sets the tensors to those of the first process."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        with _others():
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().clone(), from_process=0))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count == 1:
            return tensor
        with _others():
            total: Tensor = self.accelerator.reduce(tensor, "sum")
        return total

    def agree(self, what: str, value: Any) -> None:
        """Refuses to go on where the processes hold different values.

        Raises:
            EndedTogether: they do; `what` says of what.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise EndedTogether(
                    f"process {rank} of {self.count} has other {what} than process 0: start all with the same command "
                    "and the same files"
                )


def _text(error: Exception) -> str:
    if isinstance(error, GripError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextmanager
def _others() -> Iterator[None]:
    """Says what it means that another process does not answer."""
    try:
        yield
    except RuntimeError as error:  # of torch.distributed: the other side is gone, or silent for too long
        raise TrainError(
            "another process of this run has ended without an error of its own, as when it is killed or the machine's "
            "memory is full: see its output; the same command resumes from the last checkpoint"
        ) from error
