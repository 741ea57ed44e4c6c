"""From rows to messages: whoever has just committed, and housekeeping every few seconds, sends what is due.

The rows are marked before the messages go. A crash between the two costs redispatch_s, not a unit; a second message
costs nothing, because a claim finds the unit queued only once. The broker holds no more than the workers can take
soon: what waits, waits in SQL, where priority is exact and nothing is lost when the broker is.
"""

from service.common import repository
from service.common.errors import Unavailable
from service.common.queue import Broker
from service.common.session import Database
from service.common.settings import Settings


def dispatch(database: Database, broker: Broker, settings: Settings) -> int:
    """Send due units, the most urgent first; how many went. Unavailable when the broker is down."""
    with database.read() as session:
        window = 2 * repository.workers_online(session) + 2
    room = window - broker.depth()
    if room <= 0:
        return 0
    with database.write() as session:
        messages = repository.take_due(session, limit=room, redispatch_s=settings.redispatch_s)
    for sent, message in enumerate(messages):
        try:
            broker.send(message.unit_id, message.dispatch_seq)
        except Unavailable:
            for unsent in messages[sent:]:
                with database.write() as session:
                    repository.give_back(session, unsent)
            raise
    return len(messages)
