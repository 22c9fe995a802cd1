"""Networks of three libraries, tiny or at small inputs, with random weights: what the structure is tried on.

    python -c "import zoo; print(*zoo.names(), sep='\\n')"
    model, example = zoo.build("torchvision/resnet18")

The libraries are imported when the first of their networks is built. Weights, inputs and whatever
the library starts at a constant (scales of 1 or 1e-6, biases of 0) are drawn from one seed, and batch
norms get statistics that fit the example, so that no mistake hides behind a branch that adds nothing
or a signal that fades away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import zoo_own
import zoo_transformers
import zoo_transformers_more

Example = Tensor | dict[str, Tensor]
CLASSES, EXAMPLES, SEED = 10, 2, 0

# name -> (pixels of the square input, options of the constructor)
TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    **dict.fromkeys(["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn"], (64, {})),
    **dict.fromkeys(["alexnet", "squeezenet1_0", "mobilenet_v2", "mobilenet_v3_small"], (64, {})),
    "densenet121": (64, {}),
    "googlenet_aux": (64, {"of": "googlenet", "aux_logits": True, "init_weights": False}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    **dict.fromkeys(["shufflenet_v2_x1_0", "mnasnet1_0", "efficientnet_b0", "regnet_y_400mf"], (64, {})),
    "convnext_tiny": (64, {}),
    "vit_b_16": (64, {"image_size": 64}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    **dict.fromkeys(["efficientnet_v2_s", "mobilenet_v3_large", "resnet34", "vgg11"], (64, {})),
    "maxvit_t": (224, {}),
    "fcn_resnet50": (64, {"weights_backbone": None}),
    "deeplabv3_resnet50": (64, {"weights_backbone": None}),
    "lraspp_mobilenet_v3_large": (64, {"weights_backbone": None}),
    "ssdlite320_mobilenet_v3_large": (64, {"weights_backbone": None}),
    "retinanet_resnet50_fpn": (64, {"weights_backbone": None}),
}

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "vit_small_patch14_reg4_dinov2": (56, {"img_size": 56, "depth": 4}),
    "deit3_small_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 4}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "xcit_nano_12_p16_224": (64, {}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 4}),
    "levit_128s": (224, {}),
    "pvt_v2_b0": (64, {}),
    "coatnet_nano_rw_224": (64, {"img_size": 64}),
    "mobilevit_xxs": (64, {}),
    "edgenext_xx_small": (64, {}),
    "fastvit_t8": (64, {}),
    "poolformer_s12": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "inception_next_atto": (64, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "gmlp_s16_224": (64, {"img_size": 64}),
    "efficientnet_b0": (64, {}),
    "tf_efficientnetv2_b0": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small_050": (64, {}),
    "ghostnet_050": (64, {}),
    "resnet18d": (64, {}),
    "resnetv2_50": (64, {}),
    "res2net50_26w_4s": (64, {}),
    "regnety_002": (64, {}),
    "repvgg_a0": (64, {}),
    "hrnet_w18_small": (64, {}),
    "dla34": (64, {}),
    "eca_nfnet_l0": (64, {}),
    "volo_d1_224": (64, {"img_size": 64}),
    "crossvit_tiny_240": (240, {"depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))}),
    "tnt_s_legacy_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "visformer_tiny": (64, {"img_size": 64}),
    "efficientvit_b0": (64, {}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1)}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "stages": (1, 1, 1, 1)}),
    "sequencer2d_s": (64, {"layers": (1, 1, 1, 1)}),
    "mobileone_s0": (64, {}),
    "repvit_m0_9": (64, {}),
    "fasternet_t0": (64, {}),
    "starnet_s1": (64, {}),
    "mambaout_femto": (64, {}),
    "rexnet_100": (64, {}),
    "lcnet_050": (64, {}),
    "ese_vovnet19b_dw": (64, {}),
    "skresnet18": (64, {}),
    "resnest14d": (64, {}),
    "botnet26t_256": (64, {"img_size": 64}),
    "mobilevitv2_050": (64, {}),
    "vit_relpos_small_patch16_224": (64, {"img_size": 64, "depth": 2}),
}

# Apart from the other packages: transformers imports torchvision wherever it finds it, and fails with it
# beside a CPU build of torch.
VISION = Path(sys.prefix) / "vision"
INSTALL = {
    "torchvision": f"pip install --no-deps -c constraints.txt --target {VISION} torchvision",
    "timm": f"pip install --no-deps -c constraints.txt --target {VISION} torchvision timm",
    "transformers": "pip install 'cria-prune[hf]'",
}


def names(library: str | None = None) -> list[str]:
    """Return `library/network` of every network, or of those of one library."""
    return [name for name in NETWORKS if library in (None, name.split("/")[0])]


def build(name: str) -> tuple[nn.Module, Example]:
    """Return a network in evaluation mode with random weights, and a batch of two examples.

    Raises:
        KeyError: there is no such network.
        ModuleNotFoundError: its library is not installed; the text says how to install it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, example = NETWORKS[name]()
        settle_norms(redraw(model).eval(), example)
        return model.train().eval(), example  # training empties what some modules keep of a forward


def in_double(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Return the model, changed in place, and the example with every float in float64."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    cast_example = cast(example) if isinstance(example, Tensor) else {k: cast(v) for k, v in example.items()}
    return model.double(), cast_example


def another(example: Example) -> Example:
    """Return a batch of three that looks like a batch of two: other numbers, tokens shifted by one place.

    What has no dimension of two examples first (nodes and edges of a graph) keeps its rows.
    """

    def changed(tensor: Tensor) -> Tensor:
        rows = tensor[[1, 0, 1]] if tensor.shape[:1] == (EXAMPLES,) else tensor
        if rows.is_floating_point() and not bool(((rows == 0) | (rows == 1)).all()):
            return rows + 0.3 * torch.randn_like(rows)  # not a mask
        return rows.roll(1, -1) if rows.ndim > 1 and len(rows) != len(tensor) else rows

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 1)
        return (
            changed(example) if isinstance(example, Tensor) else {k: changed(v) for k, v in example.items()}
        )


def forward(model: nn.Module, example: Example) -> Any:
    """Call the model as its example asks for."""
    return model(**example) if isinstance(example, dict) else model(example)


def redraw(model: nn.Module) -> nn.Module:
    """Draw the parameters that start at one value (all zeros, all ones) from 0.3 to 1.3."""
    with torch.no_grad():
        for tensor in model.parameters():
            if bool((tensor == tensor.ravel()[0]).all()):
                tensor.copy_(torch.rand_like(tensor) + 0.3)
    return model


def settle_norms(model: nn.Module, example: Example) -> None:
    """Give batch norms the statistics of the example, every variance off by up to a half."""
    norms = [(item, item.momentum) for item in model.modules() if isinstance(item, _BatchNorm)]
    with torch.no_grad():
        for norm, _ in norms:
            norm.momentum = 1.0
            norm.train()
        forward(model, example)
        for norm, momentum in norms:
            norm.momentum = momentum
            variance = norm.eval().running_var
            variance.copy_(variance * (torch.rand_like(variance) + 0.5) + 0.1 * variance.mean())


@cache
def load(library: str) -> ModuleType:
    """Import a library, or say how to install it."""
    try:
        if library != "transformers":
            find_vision()
            _let_torchvision_import()
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(
            f"{library} is not installed. Install it: {INSTALL[library]}", name=library
        ) from error


def find_vision() -> None:
    """Put the folder of torchvision and timm on the path."""
    if VISION.is_dir() and str(VISION) not in sys.path:
        sys.path.append(str(VISION))


_KEPT: list[torch.library.Library] = []


def _let_torchvision_import() -> None:
    """Declare the operations that torchvision registers shapes for and that its extension would bring.

    Its wheel on PyPI is compiled for CUDA. Beside a CPU build of torch the extension does not load, and
    the import ends with `operator torchvision::nms does not exist`. No network here calls the operations.
    """
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return  # who needs it says so
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        declared = torch.library.Library("torchvision", "DEF")
        _KEPT.append(declared)  # the declarations end with the object
        for operation in ("nms", "qnms"):
            declared.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")


def _torchvision(name: str) -> tuple[nn.Module, Example]:
    models = load("torchvision").models
    size, options = TORCHVISION[name]
    options = dict(options)
    name = options.pop("of", name)
    source = next(item for item in (models, models.segmentation, models.detection) if hasattr(item, name))
    model = getattr(source, name)(weights=None, num_classes=CLASSES, **options)
    return model, torch.randn(EXAMPLES, 3, size, size)


def _timm(name: str) -> tuple[nn.Module, Example]:
    size, options = TIMM[name]
    model = load("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options)
    return model, torch.randn(EXAMPLES, 3, size, size)


def _transformers(name: str) -> tuple[nn.Module, Example]:
    return zoo_transformers.build(load("transformers"), FAMILIES[name], EXAMPLES)


FAMILIES = zoo_transformers.FAMILIES | zoo_transformers_more.FAMILIES


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    **{f"torchvision/{name}": partial(_torchvision, name) for name in TORCHVISION},
    **{f"timm/{name}": partial(_timm, name) for name in TIMM},
    **{f"transformers/{name}": partial(_transformers, name) for name in FAMILIES},
    **{f"own/{name}": partial(zoo_own.build, name) for name in zoo_own.OWN},
}
