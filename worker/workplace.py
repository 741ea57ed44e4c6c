"""What every step needs at hand, opened once in each process."""

from dataclasses import dataclass

from service.common.queue import Broker
from service.common.roots import SourceRoots
from service.common.session import Database
from service.common.settings import Settings
from service.common.storage import ArtifactStore


@dataclass(frozen=True)
class Workplace:
    settings: Settings
    database: Database
    broker: Broker
    store: ArtifactStore
    roots: SourceRoots

    @classmethod
    def open(cls, settings: Settings) -> "Workplace":
        return cls(
            settings,
            Database(settings.database_url),
            Broker(settings),
            ArtifactStore(settings.data_dir),
            SourceRoots(settings.source_roots),
        )

    def close(self) -> None:
        self.broker.close()
        self.database.close()
