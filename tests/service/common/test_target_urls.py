import pytest
from pydantic import TypeAdapter, ValidationError

from service.common.errors import TargetNotAllowed
from service.common.target_urls import TargetUrl, check_target_url

URL = TypeAdapter(TargetUrl)
ALLOWED = ("s3://bucket/models", "file:///srv/models")


@pytest.mark.parametrize(
    "url", ["s3://bucket/models", "s3://bucket/models/a/b", "file:///srv/models/x", "s3://bucket/models/"]
)
def test_what_is_below_an_allowed_url_may_be_written(url):
    check_target_url(URL.validate_python(url), ALLOWED)


@pytest.mark.parametrize("url", ["s3://bucket/models2", "s3://bucket", "gs://bucket/models/x", "file://srv/models/x"])
def test_all_else_is_refused(url):
    with pytest.raises(TargetNotAllowed, match="may write to") as refused:
        check_target_url(URL.validate_python(url), ALLOWED)
    assert refused.value.errors[0].pointer == "/target/url"


def test_nothing_is_allowed_unless_it_is_said():
    with pytest.raises(TargetNotAllowed):
        check_target_url("s3://bucket/models", ())


@pytest.mark.parametrize(
    "url",
    [
        "file:///srv/models/../../etc",
        "file:///srv/models/./x",
        "file:///srv/models//x",
        "file:///",
        "s3://",
        "/srv/models",
        "s3://key:secret@bucket/models",
        "s3://bucket/models?endpoint=http://127.0.0.1",
        "s3://bucket/models#x",
        "s3://bucket/models\\x",
        "s3://bucket/mod els",
        "s3://bucket/models/x\n",
        "s3://bucket/models/%2e%2e/x",
        "simplecache::s3://bucket/models",
        "file:///srv/models/x::s3://bucket",
    ],
)
def test_urls_are_plain(url):
    with pytest.raises(ValidationError):
        URL.validate_python(url)
