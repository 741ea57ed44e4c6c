"""What every step needs at hand, opened once in each process."""

from dataclasses import dataclass, field

from service.common.queue import Broker
from service.common.roots import SourceRoots
from service.common.session import Database
from service.common.settings import Settings
from service.common.storage import ArtifactStore
from worker.prefetch import Prefetcher
from worker.source_cache import SourceCache


@dataclass(frozen=True)
class Workplace:
    settings: Settings
    database: Database
    broker: Broker
    store: ArtifactStore
    roots: SourceRoots
    cache: SourceCache
    prefetcher: Prefetcher
    sender: Prefetcher  # of its own: a download is not to wait for an upload
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
            Prefetcher(database, settings.cancel_poll_s),
            Prefetcher(database, settings.cancel_poll_s),
        )

    def close(self) -> None:
        self.prefetcher.stop()
        self.sender.stop()
        self.broker.close()
        self.database.close()
