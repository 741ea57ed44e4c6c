"""A broker that loses, repeats and refuses just the message that a walk chooses."""

from service.common.errors import Unavailable
from service.common.repository import Message
from tests.service.machine.crashes import Crash


class Broker:
    """In memory, in place of the real one, which cannot be made to do this to one message; what dispatches is the real outbox.

    Of a dispatch it takes `patience` messages; then it is away or, with `deadly`, the sender dies.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.patience: int | None = None
        self.deadly = False

    def depth(self) -> int:
        return len(self.messages)

    def send(self, unit_id: str, dispatch_seq: int) -> None:
        if self.patience == 0:
            raise Crash if self.deadly else Unavailable("the broker is away")
        if self.patience is not None:
            self.patience -= 1
        self.messages.append(Message(unit_id, dispatch_seq))
