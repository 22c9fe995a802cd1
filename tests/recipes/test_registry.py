import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cria_prune.base.errors import ArtifactError, ConfigError, DataError
from cria_prune.recipes.cifar10 import dense_model, load_weights, read_images
from cria_prune.recipes.digits import train_dense
from cria_prune.recipes.registry import task
from cria_prune.tasks.base import data_root, evaluate, fingerprint
from cria_prune.tasks.images import ImageBatches, Images, Scaling, augment
from cria_prune.tasks.models import ARCHITECTURES, build

needs_cifar = pytest.mark.skipif(
    not (data_root() / "data" / "cifar10").is_dir() or not (data_root() / "models").is_dir(),
    reason=f"CIFAR-10 and its models are not under {data_root()}; set CRIA_DATA",
)


@pytest.fixture(scope="module")
def digits():
    return task("digits")


def test_parameter_counts_are_the_published_ones():
    counts = {name: sum(p.numel() for p in build(name).parameters()) for name in ARCHITECTURES}
    assert counts == {
        "digits": 127_082, "cifar10-resnet20": 269_722, "cifar10-resnet56": 853_018,
        "sst2-minilm": 22_713_986, "llama-shakespeare": 1_820_352,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["digits", "cifar10-resnet20", "cifar10-resnet56"])
def test_every_task_fits_its_architecture(name):
    made = task(name)
    model = build(made.architecture).eval()
    assert made.example.shape[0] == 2 and model(made.example).shape == (2, 10)
    assert made.recover_defaults.epochs > 0 and made.metric == "accuracy"


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match=r"found 'mnist'.*digits, cifar10-resnet20, cifar10-resnet56"):
        task("mnist")
    with pytest.raises(ConfigError, match=r"found 'vgg'.*Known: digits"):
        build("vgg")
    with pytest.raises(ConfigError, match="found depth 21"):
        dense_model_of_depth(21)


def dense_model_of_depth(depth):
    from cria_prune.tasks.models import CifarResNet

    return CifarResNet(depth)


def test_digits_splits_are_fixed_balanced_and_disjoint(digits):
    sizes = {name: len(digits.split(name)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 1097, "validation": 200, "test": 500}
    assert digits.split("test").labels.bincount().min() >= 48
    assert digits.fingerprint() == task("digits").fingerprint() != digits.fingerprint("test")
    with pytest.raises(DataError, match=r"found 'dev'.*train, validation, test"):
        digits.split("dev")


def test_training_batches_follow_seed_and_epoch(digits):
    def first(seed, epoch, **options):
        return next(iter(digits.train_batches(seed, **options)(epoch)))[0]

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(0, 1)) and not torch.equal(first(0, 0), first(1, 0))
    batches = digits.train_batches(0, batch_size=200, augment=False)(0)
    assert len(batches) == 6 and sum(len(y) for _, y in batches) == 1097
    assert min(len(y) for _, y in digits.train_batches(0, batch_size=8)(0)) == 8  # 1097 = 137 * 8 + 1


def test_training_batches_leave_the_global_generator_alone(digits):
    before = torch.get_rng_state()
    list(digits.train_batches(0)(0)), digits.calibration(10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_calibration_is_from_the_train_split_and_nested(digits):
    small, large = (torch.cat([x for x, _ in digits.calibration(n, seed=3)]) for n in (100, 300))
    assert torch.equal(large[:100], small) and len(small) == 100
    train = {tuple(row.flatten().tolist()) for row in digits.split("train").pixels}
    pixels = ((small * 0.376 + 0.305) * 16).round().to(torch.uint8)
    assert all(tuple(row.flatten().tolist()) in train for row in pixels)
    assert not torch.equal(small, torch.cat([x for x, _ in digits.calibration(100, seed=4)]))
    with pytest.raises(DataError, match="digits has 1097"):
        digits.calibration(5000)


def test_dense_digits_reach_98_percent_and_repeat_bit_for_bit(digits):
    before = torch.get_rng_state()
    model, again = train_dense(0), train_dense(0)
    assert evaluate(model, digits.test_batches()) >= 0.98
    assert not model.training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_evaluate_counts_and_puts_the_modes_back(digits):
    class Always(nn.Module):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    model = Always()
    share = (digits.split("test").labels[:100] == 3).float().mean().item()
    assert evaluate(model, digits.test_batches(100)) == pytest.approx(share)
    assert model.training
    with pytest.raises(DataError, match="found no examples"):
        evaluate(model, [])
    with pytest.raises(DataError, match="found no target in Tensor"):
        evaluate(model, [torch.zeros(2, 1, 8, 8)])
    assert model.training


def test_augment_moves_and_mirrors_whole_images():
    pixels = torch.arange(2 * 3 * 5 * 5, dtype=torch.uint8).view(2, 3, 5, 5)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(pixels, 0, False, generator), pixels)
    seen = set()
    for _ in range(40):
        image = augment(pixels, 1, True, generator)[0]
        candidates = {
            (dy, dx, flip): shifted(pixels[0], dy, dx, flip)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            for flip in (False, True)
        }
        seen |= {key for key, value in candidates.items() if torch.equal(value, image)}
    assert len(seen) >= 15


def shifted(image, dy, dx, flip):
    moved = nn.functional.pad(image, (1, 1, 1, 1))[:, 1 + dy : 6 + dy, 1 + dx : 6 + dx]
    return moved.flip(-1) if flip else moved


def test_image_batches_repeat_on_every_pass():
    images = Images(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(5))
    batches = ImageBatches(images, Scaling(255, (0.5,), (0.5,)), torch.tensor([4, 2, 0]), 2)
    assert len(batches) == 2 and [y.tolist() for _, y in batches] == [[4, 2], [0]]
    assert all((x == 1).all() for x, _ in batches)


def test_fingerprint_sees_values_shape_and_type():
    base = torch.zeros(2, 3)
    others = [torch.ones(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.tensor(0.0)]
    assert len({fingerprint(tensor) for tensor in [base, *others]}) == 5
    assert fingerprint(base) == fingerprint(base.t().contiguous().t())


def test_missing_files_name_the_variable_and_the_layout(monkeypatch, tmp_path):
    monkeypatch.setenv("CRIA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"not found under .*Set CRIA_DATA.*uoft-cs/cifar10"):
        task("cifar10-resnet20").test_batches()
    with pytest.raises(DataError, match=r"cifar10-resnet20.safetensors.*Set CRIA_DATA.*Idelbayev"):
        task("cifar10-resnet20").dense()
    monkeypatch.delenv("CRIA_DATA")
    assert data_root() == Path("../shared")


def test_foreign_files_are_told(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "file"
    path.write_bytes(b"not a model, not a table")
    with pytest.raises(ArtifactError, match=r"The weights in .*belongs to DigitsNet"):
        load_weights(build("digits"), path)
    with pytest.raises(DataError, match=r"CIFAR-10 images from .*columns img"):
        read_images(path)
    save_file(build("digits").state_dict(), path)
    with pytest.raises(ArtifactError, match="Missing key"):
        load_weights(build("cifar10-resnet20"), path)


def parquet(path, size=(32, 32), label=1, column="img"):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    stream = io.BytesIO()
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    Image.fromarray(pixels).save(stream, "PNG")
    table = pa.table({column: [{"bytes": stream.getvalue(), "path": None}], "label": [label]})
    pq.write_table(table, path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_read_images_is_exact_and_checks_what_it_reads(tmp_path):
    path = tmp_path / "part.parquet"
    pixels = parquet(path)
    images = read_images(path)
    assert torch.equal(images.pixels[0], pixels) and images.labels.tolist() == [1]
    parquet(path, size=(28, 28))
    with pytest.raises(DataError, match="image 0 is 28 x 28 pixels, not 32 x 32"):
        read_images(path)
    parquet(path, label=10)
    with pytest.raises(DataError, match="labels are not 0 to 9"):
        read_images(path)
    parquet(path, column="picture")
    with pytest.raises(DataError, match="CIFAR-10 images from"):
        read_images(path)


@needs_cifar
def test_published_resnets_load_and_reach_their_accuracy():
    cifar = task("cifar10-resnet20")
    assert evaluate(cifar.dense(), cifar.test_batches(500)) > 0.88
    assert not dense_model(56).training


@needs_cifar
@pytest.mark.skipif(not os.environ.get("CRIA_SLOW"), reason="set CRIA_SLOW=1: reads all of CIFAR-10")
def test_cifar_splits_share_no_row_and_give_the_published_figures():
    cifar = task("cifar10-resnet20")
    assert [len(cifar.split(name)) for name in ("train", "validation", "test")] == [48_000, 2_000, 10_000]
    rows = [set(map(bytes, cifar.split(n).pixels.numpy().reshape(-1, 3072))) for n in ("train", "validation")]
    assert len(rows[0] & rows[1]) < 10
    assert evaluate(cifar.dense(), cifar.test_batches()) == pytest.approx(0.9173, abs=3e-4)
