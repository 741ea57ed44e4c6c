import importlib
import pkgutil

from hqq_core.formats import FORMATS
from tests.hqq_core import formats
from tests.hqq_core.formats.contract import WriterContract


def test_every_format_keeps_the_contract():
    for module in pkgutil.iter_modules(formats.__path__, f"{formats.__name__}."):
        importlib.import_module(module.name)
    assert {kept.name for kept in WriterContract.__subclasses__()} == set(FORMATS)
