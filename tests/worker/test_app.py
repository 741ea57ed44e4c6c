import signal
import subprocess
import sys
from pathlib import Path

from service.common.queue import TASK
from service.common.settings import Settings


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_parent_of_the_pool_loads_neither_torch_nor_numba() -> None:
    code = "import sys, worker.tasks; print(sorted({'torch', 'numba', 'fastapi'} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_app_has_the_one_task_and_takes_json_only() -> None:
    code = f"""
from worker.app import app
app.loader.import_default_modules()
conf = app.conf
assert {TASK!r} in app.tasks
print(conf.accept_content, conf.task_acks_late, conf.worker_prefetch_multiplier, conf.worker_pool_start_method)
"""
    assert run_python(code) == "['json'] True 1 spawn"


def test_big_child_is_replaced() -> None:
    code = "from worker.app import app; print(app.conf.worker_max_memory_per_child)"
    assert run_python(code, HALFQUAD_MAX_CHILD_NBYTES=str(2 << 30)) == str(2 << 20)


def test_worker_talks_to_no_hub_unless_told_to() -> None:
    code = "import worker.app, huggingface_hub.constants as hub, os; "
    code += "print(hub.HF_HUB_OFFLINE, os.environ['TRANSFORMERS_OFFLINE'])"
    assert run_python(code) == "True 1"
    assert run_python(code, HF_HUB_OFFLINE="0", TRANSFORMERS_OFFLINE="0") == "False 0"


def test_killed_worker_leaves_no_temporary_folder(tmp_path: Path) -> None:
    """What billiard's pool shares with its children is mapped from files, as here."""
    code = """
import os, signal
import worker.app
from billiard import Value
shared = Value("i")
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {"TMPDIR": str(tmp_path), "HALFQUAD_DATA_DIR": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_worker_refuses_a_database_below_head(tmp_path) -> None:
    settings = Settings(data_dir=tmp_path)
    environment = {"HALFQUAD_DATA_DIR": str(settings.data_dir)}
    done = subprocess.run(
        [sys.executable, "-m", "worker", "--hostname", "w@%h"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 1
    assert "halfquad migrate" in done.stderr
