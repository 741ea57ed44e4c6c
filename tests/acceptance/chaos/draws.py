"""What happens to which job, all of it decided by a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

PHASES = ("preflight", "profiling", "quantizing", "verifying", "uploading")
STEPS = ("download", "look", "preupload", "object", "before the commit", "after the commit")
VICTIMS = ("worker", "pool child", "hub child", "api", "broker", "broker and all it holds")
SLEEPERS = {"worker asleep": 12.0, "api asleep": 3.0, "broker asleep": 5.0}  # seconds; a lease is of 8

FINAL = {"401": 401, "403": 403, "404": 404}  # a Hub that says so is believed
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"status": status} for name, status in FINAL.items()},
    "409": {"status": 409},
    "412": {"status": 412},
    "429": {"status": 429, "retry_after_s": 1},
    "500 before": {"status": 500},
    "500 after": {"status": 500, "after": True},
    "reset before": {"reset": True},
    "reset after": {"reset": True, "after": True},
    "truncated": {"truncate_at": 9},
    "slow": {},  # a rate, by the request's size
}


@dataclass(frozen=True)
class Point:
    """Requests of one job: {source} and {target} are its repos, {weights} and {made} the hashes of files there."""

    method: str
    path: str
    rate: float = 500.0  # bytes per second of a slow body
    anyone: bool = False  # nothing in the request tells whose it is: only what is tried again may happen to it


POINTS = {
    "info of the source": Point("GET", r"^/api/models/{source}(/revision/.*)?$"),
    "files of the source": Point("GET", r"^/api/models/{source}/tree/"),
    "config of the source": Point("GET", r"^/{source}/resolve/.*/config\.json"),
    "way to the weights": Point("HEAD|GET", r"^/{source}/resolve/.*\.safetensors$"),
    "weights": Point("GET", r"^/storage/({weights})$", 60_000.0),
    "account": Point("GET", r"^/api/whoami-v2$", anyone=True),
    "info of the target": Point("GET", r"^/api/models/{target}$"),
    "refs of the target": Point("GET", r"^/api/models/{target}/refs$"),
    "history of the target": Point("GET", r"^/api/models/{target}/commits/"),
    "files of the target": Point("GET", r"^/api/models/{target}/tree/"),
    "earlier manifest": Point("GET", r"^/{target}/resolve/.*/halfquad_manifest\.json$"),
    "creation of a repo": Point("POST", r"^/api/repos/create$", anyone=True),
    "list of pull requests": Point("GET", r"^/api/models/{target}/discussions$"),
    "pull request": Point("POST", r"^/api/models/{target}/discussions$"),
    "preupload": Point("POST", r"^/api/models/{target}/preupload/"),
    "LFS batch": Point("POST", r"^/{target}\.git/info/lfs/objects/batch$"),
    "LFS object": Point("PUT", r"^/storage/({made})$", 40_000.0),
    "commit": Point("POST", r"^/api/models/{target}/commit/", 2_000.0),
}
AT_STEP: dict[str, tuple[str, dict[str, Any]]] = {  # where something happens inside a step, the request waits for it
    "download": ("weights", {"delay_s": 3.0}),
    "look": ("info of the target", {"delay_s": 3.0}),
    "preupload": ("preupload", {"delay_s": 3.0}),
    "object": ("LFS object", {"delay_s": 3.0}),
    "before the commit": ("commit", {"delay_s": 3.0}),
    "after the commit": ("commit", {"delay_s": 3.0, "after": True}),
}


@dataclass(frozen=True)
class HubTrouble:
    """Faults of the Hub at requests of one job."""

    point: str
    kind: str
    nth: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} at {self.point}"


@dataclass(frozen=True)
class Strike:
    """Something that is done to a job, or to what works on it, at a moment: a phase that begins, or a step it is in."""

    what: str  # one of VICTIMS or SLEEPERS, "cancel", "messages again"
    moment: str

    def __str__(self) -> str:
        return f"{self.what} {'in' if self.moment in STEPS else 'at'} {self.moment}"


Trouble = HubTrouble | Strike
TargetKind = Literal["repo", "pull request", "branch", "overwrite", "url"]


@dataclass(frozen=True)
class Draw:
    """One job, and its troubles."""

    number: int
    target: TargetKind
    several: bool  # two recipes
    energy: str
    keep: bool
    troubles: tuple[Trouble, ...]

    @property
    def name(self) -> str:
        return f"{self.number:03d}"


def draw_jobs(seed: int, njobs: int) -> list[Draw]:
    """A sixth of the jobs is left alone; of the others half have one trouble, half have two."""
    dice = random.Random(seed)
    hub, strikes = _dealt(dice, _hub_troubles()), _dealt(dice, _strikes())
    return [_draw(dice, number, hub, strikes) for number in range(njobs)]


def _draw(dice: random.Random, number: int, hub: Iterator[Trouble], strikes: Iterator[Trouble]) -> Draw:
    how_many = 0 if dice.random() < 1 / 6 else dice.choice((1, 2))
    troubles = tuple(next(hub if dice.random() < 0.55 else strikes) for _ in range(how_many))
    target = dice.choices(("repo", "pull request", "branch", "overwrite", "url"), (5, 3, 1, 2, 2))[0]
    if any(_needs_hub_target(trouble) for trouble in troubles) and target == "url":
        target = "repo"
    if _is_at(troubles, "pull request"):
        target = "pull request"
    elif _is_at(troubles, "earlier manifest"):
        target = "overwrite"
    profiled = any(isinstance(trouble, Strike) and trouble.moment == "profiling" for trouble in troubles)
    energy = dice.choices(("none", "analytic", "synthetic"), (0, 1, 1) if profiled else (7, 1, 2))[0]
    return Draw(number, target, dice.random() < 0.2, energy, dice.random() < 0.7, troubles)


def _is_at(troubles: tuple[Trouble, ...], point: str) -> bool:
    return any(isinstance(trouble, HubTrouble) and point in trouble.point for trouble in troubles)


def _needs_hub_target(trouble: Trouble) -> bool:
    if isinstance(trouble, Strike):
        return trouble.moment in STEPS and trouble.moment != "download"
    return "{target}" in POINTS[trouble.point].path or "{made}" in POINTS[trouble.point].path


def _hub_troubles() -> list[Trouble]:
    return [
        HubTrouble(point, kind)
        for point, asked in POINTS.items()
        for kind in KINDS
        if not (asked.anyone and kind in FINAL)
    ]


def _strikes() -> list[Trouble]:
    killed = [Strike(victim, moment) for victim in (*VICTIMS, *SLEEPERS) for moment in (*PHASES, *STEPS)]
    told = [Strike(what, moment) for what in ("cancel", "messages again") for moment in (*PHASES, *STEPS)]
    return [*killed, *told]


def _dealt(dice: random.Random, deck: list[Trouble]) -> Iterator[Trouble]:
    """All of the deck in some order, then again in another: so a long run leaves nothing out."""
    while True:
        for card in dice.sample(deck, len(deck)):
            if isinstance(card, HubTrouble):
                yield HubTrouble(card.point, card.kind, nth=dice.choice((1, 1, 2)), count=dice.choice((1, 1, 2, 5)))
            else:
                yield card
