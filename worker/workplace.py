"""What every step needs at hand, opened once in each process."""

from dataclasses import dataclass, field

from service.common.queue import Broker
from service.common.roots import SourceRoots
from service.common.session import Database
from service.common.settings import Settings
from service.common.storage import ArtifactStore
from worker.errands import Errands
from worker.source_cache import SourceCache


@dataclass(frozen=True)
class Workplace:
    settings: Settings
    database: Database
    broker: Broker
    store: ArtifactStore
    roots: SourceRoots
    cache: SourceCache
    prefetcher: Errands  # one for each kind: a download is not to wait for an upload
    solver: Errands
    checker: Errands
    sender: Errands
    sent: set[tuple[str, str]] = field(default_factory=set)  # files of jobs that it has sent

    @classmethod
    def open(cls, settings: Settings) -> "Workplace":
        database = Database(settings.database_url)
        return cls(
            settings,
            database,
            Broker(settings),
            ArtifactStore(settings.data_dir),
            SourceRoots(settings.source_roots),
            SourceCache(settings.data_dir / "sources", settings.source_cache_nbytes, settings.min_free_nbytes),
            prefetcher=Errands(database, settings.cancel_poll_s),
            solver=Errands(database, settings.cancel_poll_s),
            checker=Errands(database, settings.cancel_poll_s),
            sender=Errands(database, settings.cancel_poll_s),
        )

    def close(self) -> None:
        for errands in (self.prefetcher, self.solver, self.checker, self.sender):
            errands.stop()
        self.broker.close()
        self.database.close()
