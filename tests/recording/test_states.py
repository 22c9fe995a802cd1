"""What is recorded: no more than a criterion reads, of some of the tokens."""

import numpy as np
import pytest
import torch
from tests.criteria.test_baselines_weights import llama
from tests.recording.test_collect import ALL
from tests.recording.test_collect_networks import conv_net, images, mlp

from cria_prune import PruneConfig, discover, prune
from cria_prune.base.errors import CriterionError
from cria_prune.config import RecordConfig, ScoreConfig
from cria_prune.criteria.score import score
from cria_prune.criteria.table import CRITERIA
from cria_prune.recording.collect import record
from cria_prune.recording.sampling import Sampler, draw_tokens, tokens_drawn
from cria_prune.recording.states import EVERYTHING, reads_of
from cria_prune.repair.consumers import compensate

WITHOUT_GRADIENTS = [name for name, item in CRITERIA.items() if item.needs and "gradients" not in item.needs]


def equal(a, b):
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-12, atol=0)
    assert a.diagnosis.split_half == pytest.approx(b.diagnosis.split_half, abs=1e-12)


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
@pytest.mark.parametrize("exact", [2048, 4])
def test_a_criterion_scores_the_same_from_what_it_reads(name, exact):
    model, groups = conv_net(dtype=torch.float64)
    config = RecordConfig(positions=64, exact_units=exact, sketch_columns=8)
    batches, chosen = images(12, batch=5, dtype=torch.float64), ScoreConfig(criterion=name)
    everything = score(model, groups, record(model, groups, batches, config), chosen)
    states = record(model, groups, batches, config, reads=reads_of(CRITERIA[name].needs))
    found = score(model, groups, states, chosen)
    for group in groups.prunable:
        equal(found[group.name], everything[group.name])
        if "input" not in CRITERIA[name].needs:
            assert states[group.name].input is None and states[group.name].inputs is None
        if "output" not in CRITERIA[name].needs:
            output = states[group.name].output
            assert output.covariance is None and output.sketch is None
    assert "none" in str(states) or "output" in states.reads


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_the_repair_is_the_same_whatever_the_criterion_reads(kind):
    if kind == "images":
        model, groups = conv_net(dtype=torch.float64)
        batches = images(40, dtype=torch.float64)
    else:
        model, groups = mlp(torch.float64)
        batches = [torch.randn(30, 7, dtype=torch.float64)]
    kept = {group.name: np.arange(group.size - 2) for group in groups.prunable}
    weights = []
    for reads in (EVERYTHING, frozenset()):
        states = record(model, groups, batches, ALL, consumed=True, reads=reads)
        consumed = {name: item.consumed for name, item in states.groups.items()}
        repaired, repairs = compensate(model, groups, kept, consumed)
        assert repairs
        weights.append(repaired.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-9, atol=1e-10)


def test_states_that_lack_what_a_criterion_reads_are_refused():
    model, groups = conv_net()
    states = record(model, groups, images(12), reads=frozenset({"positive"}))
    with pytest.raises(CriterionError, match=r"'distortion'.*recorded without 'input' and 'output'.*Record"):
        score(model, groups, states, ScoreConfig(criterion="distortion"))
    with pytest.raises(CriterionError, match=r"'innovation'.*recorded without 'output'"):
        score(model, groups, states, ScoreConfig(criterion="innovation"))
    score(model, groups, states, ScoreConfig(criterion="apoz"))
    fisher = record(model, groups, images(12), per_example=True, reads=frozenset())
    assert fisher["0"].input is not None and fisher["0"].fisher.abs().max() > 0


def test_the_graphs_of_a_pruning_are_kept_whatever_its_criterion_reads():
    model, _ = conv_net()
    plan = {"reduction": 0.3, "rounds": 2}
    result = prune(model, images(24), PruneConfig(plan=plan, score={"criterion": "apoz"}), graphs=True)
    assert set(result.graphs) == {group.name for group in result.dense.prunable} != set()


def test_tokens_are_spread_over_the_text_whatever_the_batch_and_the_padding():
    lengths = np.array([40, 3, 17, 0, 40])
    mask = np.arange(40) < lengths[:, None]
    places, taken = draw_tokens(3, 0, mask, 6)
    assert taken.sum(axis=1).tolist() == [6, 3, 6, 0, 6]
    for row, kept, length in zip(places, taken, lengths, strict=True):
        drawn = row[kept]
        assert (np.diff(drawn) > 0).all() and (drawn < length).all()
        pieces = len(drawn)
        assert all(i * length // pieces <= at < (i + 1) * length // pieces for i, at in enumerate(drawn))
    assert places[0].tolist() != places[4].tolist()  # each example has its own
    alone, _ = draw_tokens(3, 2, mask[2:3, :20], 6)
    assert alone[0].tolist() == places[2].tolist()
    both = np.roll(mask, 5, axis=1)  # padded on both sides
    shifted = draw_tokens(3, 0, both, 6)[0]
    assert all((shifted[row][taken[row]] - places[row][taken[row]] == 5).all() for row in (1, 2))
    every = np.concatenate([draw_tokens(0, n, mask[:1], 6)[0][0] for n in range(500)])
    assert np.bincount(every, minlength=40).min() > 40  # 75 expected


@pytest.mark.parametrize(
    ("tokens", "least", "drawn"), [(20, 16, 16), (300, 16, 37), (5, 16, 5), (20, None, 20)]
)
def test_a_long_text_gives_one_token_in_eight(tokens, least, drawn):
    assert tokens_drawn(tokens, least) == drawn
    assert draw_tokens(0, 0, np.ones((2, tokens), dtype=bool), least)[0].shape == (2, drawn)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("exact", [2048, 4])
def test_the_moments_are_those_of_the_drawn_tokens(masked, exact):
    network = llama()
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (6, 20))
    mask = torch.ones(6, 20, dtype=torch.long)
    if masked:
        mask[1, 4:], mask[4, :10] = 0, 0
    batch = {"input_ids": tokens, "attention_mask": mask} if masked else {"input_ids": tokens}
    groups = discover(network, batch)
    config = RecordConfig(tokens=5, seed=2, exact_units=exact)
    states = record(network, groups, [{key: item[:4] for key, item in batch.items()},
                                      {key: item[4:] for key, item in batch.items()}], config)  # fmt: skip
    down = "model.layers.0.mlp.down_proj"
    seen = hooked_with(network, batch, down)
    places, taken = draw_tokens(2, 0, mask.bool().numpy(), 5)
    samples = np.concatenate([seen[row][places[row][taken[row]]] for row in range(6)])
    assert taken.sum() == (6 * 5 - 1 if masked else 30)
    name = next(group.name for group in groups.prunable if group.kind == "gated" and "layers.0" in group.name)
    found = states[name].output
    assert found.samples == len(samples)
    assert states[name].input.samples == 2 * len(samples)  # gate and up
    np.testing.assert_allclose(found.mean, samples.mean(axis=0), rtol=1e-4, atol=1e-7)
    covariance = np.cov(samples.T, bias=True)
    kept = found.covariance if exact == 2048 else found.sketch @ found.sketch.T / found.samples
    np.testing.assert_allclose(kept, covariance, rtol=1e-3, atol=1e-6)


def test_rows_that_are_no_tokens_are_all_taken():
    """Routed tokens come as a matrix: whether their number is a multiple of the examples means nothing."""
    sampler = Sampler(RecordConfig(tokens=5))
    sampler.begin(0, 4, None)

    def taken(*shape):
        return sum(len(part) for _, part, _ in sampler.halves(torch.randn(shape), -1, "x", False))

    assert (taken(128, 3), taken(127, 3)) == (128, 127)
    assert (taken(4, 32, 3), taken(8, 32, 3)) == (4 * 5, 4 * 8)  # windows of an image go with it
    sampler.begin(0, 4, torch.ones(4, 32))
    assert (taken(128, 3), taken(127, 3)) == (4 * 5, 127)  # tokens of the texts, folded


def test_graphs_ask_for_both_sides_of_their_groups_alone():
    model, groups = conv_net()
    states = record(model, groups, images(12), reads=frozenset(), graphs=["3"])
    assert states["0"].input is None and not states["0"].output.has_pairs
    assert states["3"].input.has_pairs and states["3"].output.has_pairs


def hooked_with(network, batch, name):
    """The input of a module, (examples, tokens, features), under the whole batch."""
    seen = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network.eval()(**batch)
    handle.remove()
    return seen[0].numpy()


def test_padding_does_not_change_what_is_recorded():
    model, groups = mlp(torch.float64)
    inner = type(model)
    model.forward = lambda x, attention_mask: inner.forward(model, x)
    X, lengths = torch.randn(4, 24, 7, dtype=torch.float64), torch.tensor([24, 9, 20, 11])
    mask = torch.arange(24) < lengths[:, None]
    config = RecordConfig(tokens=6)
    one = record(model, groups, [{"x": X, "attention_mask": mask}], config)
    parts = [
        {"x": X[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]} for i, n in enumerate(lengths.tolist())
    ]
    other = record(model, groups, parts, config)
    for side in ("input", "output"):
        a, b = getattr(one["first"], side), getattr(other["first"], side)
        assert a.samples == b.samples == 4 * 6 * a.samples // 24
        torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-9, atol=1e-12)
