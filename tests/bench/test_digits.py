"""The suite: splits that do not leak, tasks that say what they ask, training that repeats."""

from __future__ import annotations

import pytest
import torch

from fusewright.bench.digits import evaluate, model, store, tasks, train
from fusewright.bench.digits.train import Training

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

TINY = Training(width=16, layers=1, batch=16, base_steps=2, expert_steps=2, multitask_steps=1)


def test_no_image_is_in_two_splits():
    parts = {k: {image.numpy().tobytes() for image in s.images} for k, s in tasks.splits().items()}
    assert not parts["train"] & parts["test"]
    assert not parts["validation"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert [len(tasks.splits()[k]) for k in ("validation", "test")] == [200, 600]


def test_every_split_holds_every_digit_in_the_same_share():
    whole = torch.cat([split.digits for split in tasks.splits().values()])
    for split in tasks.splits().values():
        shares = split.digits.bincount(minlength=10) / len(split)
        assert torch.allclose(shares, whole.bincount() / len(whole), atol=0.01)


def test_tasks_conflict_on_the_same_images():
    found = {task.name: task.labels(torch.arange(10)).tolist() for task in tasks.TASKS}
    assert found["parity"] == [0, 1] * 5
    assert found["magnitude"] == [0] * 5 + [1] * 5
    assert [d for d in range(10) if found["holes"][d]] == [0, 4, 6, 8, 9]


@pytest.mark.parametrize("view", tasks.VIEWS)
def test_views_keep_the_pixels_and_only_upright_changes_nothing(view):
    images = tasks.splits()["test"].images[:20]
    shown = tasks.seen(images, view)
    assert torch.equal(shown, images) == (view == "upright")
    kept = 1 - shown if view == "inverted" else shown
    assert torch.equal(kept.flatten(1).sort().values, images.flatten(1).sort().values)


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="no view 'sideways'"):
        tasks.seen(torch.zeros(1, 1, 8, 8), "sideways")


def weights(network) -> torch.Tensor:
    return torch.cat([p.flatten() for p in network.state_dict().values()])


def test_training_repeats_exactly_and_depends_on_the_seed():
    first, again, other = (train.pretrain(TINY, seed) for seed in (0, 0, 1))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train.pretrain(TINY, 0)
    assert torch.equal(torch.rand(3), expected)


def test_an_expert_leaves_base_and_head_unchanged():
    base = train.pretrain(TINY, 0)
    task = tasks.TASKS[1]
    head = train.frozen_head(base, task, TINY, 0)
    before, head_before = weights(base).clone(), head.clone()
    expert = train.expert(base, task, head, TINY, 0)
    assert torch.equal(weights(base), before) and torch.equal(head, head_before)
    assert not torch.equal(weights(expert), before)


def test_heads_have_a_row_of_length_one_for_each_class():
    base = train.pretrain(TINY, 0)
    for task in tasks.TASKS:
        head = train.frozen_head(base, task, TINY, 0)
        assert head.shape == (task.outputs, TINY.width)
        assert torch.allclose(head.norm(dim=1), torch.ones(task.outputs), atol=1e-5)


def test_stored_models_are_what_was_trained_and_open_with_transformers(tmp_path):
    suite = store.trained(tmp_path, TINY, 0)
    base = train.pretrain(TINY, 0)
    assert torch.equal(weights(model.open_model(suite.base)), weights(base))
    assert {p.name for p in suite.base.iterdir()} == {"config.json", "model.safetensors"}
    head = train.frozen_head(base, tasks.TASKS[0], TINY, 0)
    assert torch.equal(suite.heads()[tasks.TASKS[0]], head)


def test_the_cache_is_used_and_knows_its_recipe(tmp_path, monkeypatch):
    heard: list[str] = []
    first = store.trained(tmp_path, TINY, 0, heard.append)
    assert heard == store.names()
    again = store.trained(tmp_path, TINY, 0, heard.append)
    assert again == first and heard == store.names()
    assert store.key_of(TINY) != store.key_of(Training())
    monkeypatch.setattr("fusewright.__version__", "99")
    assert not store.is_trained(tmp_path, TINY, 0)


def test_a_run_that_died_while_training_leaves_no_seed_behind(tmp_path):
    def die(name: str) -> None:
        if name == "holes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.trained(tmp_path, TINY, 0, die)
    assert not store.is_trained(tmp_path, TINY, 0)


def test_an_ensemble_of_one_answers_as_the_model_does():
    base, test = train.pretrain(TINY, 0), tasks.splits()["validation"]
    heads = {task: train.frozen_head(base, task, TINY, 0) for task in tasks.TASKS}
    said = evaluate.logits(base, heads, test)
    expected = evaluate.outcomes(base, heads, test)
    assert expected.shape == (len(tasks.TASKS), len(test))
    assert (evaluate.right(evaluate.ensemble([said]), test) == expected).all()


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with model.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
