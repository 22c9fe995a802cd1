"""Random networks as small programs: seeded, printable, shrinkable.

`network(seed)` draws a `Program`: classes with attributes and statements. `str(program)` is a Python
file that builds `model` and `example`; that same text is what the tests run. What can be drawn
stands in `generator_image`, `generator_sequence` and `generator_attention`, one function per block.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

KINDS = ("image", "sequence", "token")
FURTHER = 1_000_000
"""From this seed on networks have the blocks of `generator_recurrent` and `generator_further` too."""
HEADER = "import math\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn"
FOOTER = """
torch.manual_seed({seed})
model = Net().eval()
for tensor in (*model.parameters(), *model.buffers()):
    if tensor.is_floating_point() and tensor.ndim == 1:
        nn.init.uniform_(tensor, 0.3, 1.3)
example = {example}
"""


class Statement(NamedTuple):
    """`targets = expression` in a forward; several targets stand with commas."""

    targets: str
    expression: str


@dataclass
class Program:
    """One class of a network: its attributes, the statements of its forward and the classes it uses."""

    name: str
    arguments: tuple[str, ...] = ("x",)
    attributes: dict[str, str] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    returns: tuple[str, ...] = ()
    parts: list[Program] = field(default_factory=list)
    seed: int = 0
    example: dict[str, str] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Image, sequence or token."""
        return self.blocks[0]

    def live(self) -> list[Statement]:
        """The statements that the returned values need, in order."""
        needed, result = set(self.returns), list[Statement]()
        for statement in reversed(self.statements):
            if needed & set(statement.targets.split(", ")):
                result.append(statement)
                needed |= set(re.findall(r"\b[a-z]\w*", statement.expression))
        return result[::-1]

    def lines(self) -> Iterator[str]:
        """The text of the class, its parts first; attributes that no statement reads are left out."""
        statements = self.live()
        text = " ".join(statement.expression for statement in statements)
        read = set(re.findall(r"self\.(\w+)", text))
        used = {name: value for name, value in self.attributes.items() if name.split(".")[0] in read}
        for part in self.parts:
            if any(f"{part.name}(" in value for value in used.values()):
                yield from part.lines()
        yield from ("", "", f"class {self.name}(nn.Module):", "    def __init__(self):")
        yield "        super().__init__()"
        yield from (f"        self.{name} = {value}" for name, value in used.items())
        yield from ("", f"    def forward(self, {', '.join(self.arguments)}):")
        yield from (f"        {statement.targets} = {statement.expression}" for statement in statements)
        yield f"        return {', '.join(self.returns)}"

    def __str__(self) -> str:
        only = len(self.example) == 1
        items = ", ".join(f"{name!r}: {value}" for name, value in self.example.items())
        example = next(iter(self.example.values())) if only else f"{{{items}}}"
        return (
            "\n".join([HEADER, *self.lines(), FOOTER.format(seed=self.seed, example=example)]).strip() + "\n"
        )

    def build(self) -> tuple[Any, Any]:
        """Run the printed program; return its model and example."""
        space: dict[str, Any] = {}
        exec(compile(str(self), f"<network {self.seed}>", "exec"), space)
        return space["model"], space["example"]

    def smaller(self) -> Iterator[Program]:
        """Yield the programs with one statement replaced by a value that it reads, or one output dropped."""
        for index in range(len(self.returns)):
            if len(self.returns) > 1:
                yield self._with(returns=self.returns[:index] + self.returns[index + 1 :])
        statements = self.live()
        for index, (targets, expression) in reversed(list(enumerate(statements))):
            known = {name for item in statements[:index] for name in item.targets.split(", ")}
            for name in dict.fromkeys(re.findall(r"(?<![.\w])[a-z]\w*", expression)):
                if name in known | set(self.arguments):
                    rest = [_renamed(item, targets, name) for item in statements[index + 1 :]]
                    returns = tuple(name if item in targets.split(", ") else item for item in self.returns)
                    yield self._with(statements=statements[:index] + rest, returns=returns)
        for index, part in enumerate(self.parts):
            for less in part.smaller():
                yield self._with(parts=[*self.parts[:index], less, *self.parts[index + 1 :]])

    def _with(self, **changes: Any) -> Program:
        program = copy.copy(self)
        vars(program).update(changes)
        return program


def _renamed(statement: Statement, targets: str, name: str) -> Statement:
    expression = statement.expression
    for target in targets.split(", "):
        expression = re.sub(rf"(?<![.\w]){target}\b", name, expression)
    return Statement(statement.targets, expression)


def shrunk(program: Program, fails: Callable[[Program], bool], tries: int = 400) -> Program:
    """Drop statements while the program still fails."""
    found = True
    while found:
        found = False
        for smaller in program.smaller():
            tries -= 1
            if tries < 0:
                return program
            if len(str(smaller)) < len(str(program)) and fails(smaller):
                program, found = smaller, True
                break
    return program


@dataclass(frozen=True)
class Value:
    """A tensor of the program: an image (batch, width, *space) or a sequence (batch, *space, width)."""

    name: str
    width: int
    space: tuple[int, ...]


Block = Callable[["Draw", Value], Value | None]
BLOCKS: dict[str, list[tuple[int, Block]]] = {
    kind: [] for kind in ("image", "sequence", "further image", "further sequence")
}


def block(kind: str, weight: int) -> Callable[[Block], Block]:
    """Register a block that takes a value to the next one, or gives None where it does not fit."""

    def register(function: Block) -> Block:
        BLOCKS[kind].append((weight, function))
        return function

    return register


class Draw:
    """Draws the statements of one class; parts of a network share its generator and numbering."""

    def __init__(self, random: np.random.Generator, program: Program, numbers: Iterator[int]) -> None:
        self.random, self.program, self.numbers = random, program, numbers
        self.values: list[Value] = []
        self.condition: tuple[str, int] | None = None
        self.further = False

    def pick(self, *options: Any) -> Any:
        """Return one of the options."""
        return options[int(self.random.integers(len(options)))]

    def chance(self, share: float) -> bool:
        """Return True in this share of the cases."""
        return bool(self.random.random() < share)

    def width(self) -> int:
        """Return a width; some divide others, some do not."""
        return self.pick(4, 5, 6, 6, 7, 8, 8, 9, 12, 12, 16)

    def divisor(self, *numbers: int) -> int:
        """Return a divisor of all the numbers, one only where there is no other."""
        shared = [item for item in range(2, min(numbers) + 1) if not any(number % item for number in numbers)]
        return self.pick(*shared) if shared else 1

    def attribute(self, name: str, value: Any, *, number: bool = True) -> str:
        """Set an attribute of the class and return the expression that reads it."""
        name = f"{name}{next(self.numbers)}" if number else name
        self.program.attributes[name] = str(value)
        return f"self.{name}"

    def parameter(self, name: str, *sizes: int) -> str:
        """Set a parameter with random values."""
        return self.attribute(name, f"nn.Parameter(torch.rand({', '.join(map(str, sizes))}) - 0.3)")

    def buffer(self, name: str, *sizes: int) -> str:
        """Set a buffer with random values."""
        return self.attribute(name, f"nn.Buffer(torch.rand({', '.join(map(str, sizes))}) + 0.2)")

    def let(self, expression: str) -> str:
        """Add a statement and return its new variable."""
        name = f"x{next(self.numbers)}"
        self.program.statements.append(Statement(name, expression))
        return name

    def lets(self, count: int, expression: str) -> list[str]:
        """Add a statement with several targets and return them."""
        names = [f"x{next(self.numbers)}" for _ in range(count)]
        self.program.statements.append(Statement(", ".join(names), expression))
        return names

    def part(self, name: str, *arguments: str) -> Draw:
        """Return the draw of a nested class; `use` makes an attribute of it."""
        program = Program(f"{name}{next(self.numbers)}", arguments)
        self.program.parts.append(program)
        return Draw(self.random, program, self.numbers)

    def use(self, part: Draw, result: str, *arguments: str) -> str:
        """Close a nested class with its result and return the variable of its call."""
        part.program.returns = (result,)
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", part.program.name).lower()
        module = self.attribute(name, f"{part.program.name}()", number=False)
        return self.let(f"{module}({', '.join(arguments)})")

    def step(self, kind: str, x: Value) -> Value:
        """Draw one block that fits."""
        known = BLOCKS[kind]
        if self.further and self.chance(0.6):
            known = BLOCKS[f"further {kind}"]
        weights = np.array([weight for weight, _ in known], dtype=float)
        while True:
            function = known[int(self.random.choice(len(weights), p=weights / weights.sum()))][1]
            result = function(self, x)
            if result is not None and 2 <= result.width <= 48:
                self.program.blocks.append(function.__name__)
                self.values.append(result)
                return result

    def activation(self, name: str) -> str:
        """Return an expression of a nonlinear function."""
        form = self.pick(
            *["F.relu({0})"] * 4, *["F.gelu({0})"] * 3, *["F.silu({0})"] * 2, "torch.tanh({0})",
            "torch.sigmoid({0})", "F.leaky_relu({0}, 0.1)", "F.elu({0})", "F.hardswish({0})", "F.mish({0})",
            "{0} * torch.sigmoid({0})", "F.softplus({0})", "F.relu({0}).square()", "{0}.clamp(min=-0.5)",
            "torch.where({0} > 0, {0}, {0} * 0.1)", "{0}.abs()", "F.relu({0} + 1, inplace=True)",
            "{0} / (1 + {0}.abs())", "torch.exp(-{0}.abs())", "F.dropout({0}, 0.1, self.training)",
        )  # fmt: skip
        return str(form.format(name))


def network(seed: int) -> Program:
    """Return the network of a seed."""
    from generator_image import image
    from generator_sequence import sequence, token

    random = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    program = Program("Net", seed=seed, blocks=[kind])
    draw = Draw(random, program, iter(range(1, 10_000)))
    if seed >= FURTHER:
        import generator_further  # noqa: F401 - registers its blocks

        draw.further = True
    {"image": image, "sequence": sequence, "token": token}[kind](draw)
    return program
