"""Model cards: what is refused, and what they tell."""

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from tests.fakehub.server import FakeHub

REPO = "team-a/model"


CARDS = {
    "---\nlicense: [\n---\n": "YAML metadata is invalid",
    "---\nlicense: mine\n---\n": '"license" must be one of',
    "---\ntags: one\n---\n": '"tags" must be an array',
    "---\ntags: [1]\n---\n": r'"tags\[0\]" must be a string',
    "---\nbase_model: ./here/and/there\n---\n": '"base_model" with value "./here/and/there" is not valid',
    "---\nbase_model_relation: cousin\n---\n": '"base_model_relation" must be one of',
    "---\nlanguage: English\n---\n": '"language" with value "English"',
    "---\nlibrary_name: 3\n---\n": '"library_name" must be a string',
    "---\nmodel-index: [{name: a, results: [{task: {}}]}]\n---\n": r'"model-index\[0\].results\[0\].dataset" is required',
    "---\n- a\n---\n": "must be of type object",
}


@pytest.mark.parametrize("card", CARDS)
def test_cards_with_wrong_metadata_are_refused_before_anything_is_sent(card: str, fakehub: FakeHub, api: HfApi) -> None:
    fakehub.add_repo(REPO)
    with pytest.raises(ValueError, match=CARDS[card]):
        api.create_commit(REPO, [CommitOperationAdd("README.md", card.encode())], commit_message="x")
    assert not fakehub.requests.find("/preupload/|/commit/")


def test_a_cards_metadata_becomes_tags(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.add_repo(REPO)
    card = "---\nlicense: apache-2.0\nbase_model: a/b\nbase_model_relation: quantized\ntags: [hqq]\n---\n# x\n"
    config = b'{"model_type": "llama"}'
    operations = [CommitOperationAdd("README.md", card.encode()), CommitOperationAdd("config.json", config)]
    api.create_commit(REPO, operations, commit_message="x")
    info = api.model_info(REPO)
    assert {"hqq", "license:apache-2.0", "base_model:a/b", "base_model:quantized:a/b"} <= set(info.tags or [])
    assert info.config == {"model_type": "llama"}
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_commit(REPO, [CommitOperationAdd("README.md", b"# bare")], commit_message="x")
