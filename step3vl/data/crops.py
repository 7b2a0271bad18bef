"""Many crops of one image, for self-distillation: a few large ones, many small ones, and which patches are hidden.

Crops differ in place, size, aspect and a little in colour; they are never mirrored, because text would be. All draws
follow from the seed and the sample's place in the mixture, not from workers, ranks or what came before.

Shapes: n images, G global and L local crops of each, C colour channels, S/s their sides in pixels, P patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from zlib import crc32

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from step3vl.data.array_image import pixels_of
from step3vl.data.mixture import Draw, Mixture
from step3vl.data.plan import Step
from step3vl.data.shuffle import mix

GREY = (0.299, 0.587, 0.114)
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CropRecipe:
    """How an image is cut and hidden. Defaults are DINOv3's: two crops of 256 px and eight of 112 px."""

    global_size: int = 256
    """Side of a global crop in pixels."""
    local_size: int = 112
    """Side of a local crop in pixels."""
    num_global: int = 2
    num_local: int = 8
    global_scale: Pair = (0.32, 1.0)
    """Least and largest share of the image's area in a global crop."""
    local_scale: Pair = (0.05, 0.32)
    """The same of a local crop."""
    aspect: Pair = (3 / 4, 4 / 3)
    """Width over height of what is cut, before it is made square."""
    jitter: float = 0.2
    """Brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter; 0: never."""
    mask_probability: float = 0.5
    """Share of global crops of which patches are hidden."""
    mask_share: Pair = (0.1, 0.5)
    """Least and largest share of patches that are then hidden."""

    def __post_init__(self) -> None:
        sizes = (self.global_size, self.local_size, self.num_global)
        if min(sizes) < 1 or self.num_local < 0:
            raise ValueError(f"crops: sizes and num_global must be at least 1 and num_local at least 0, got {self}")
        for name in ("global_scale", "local_scale", "mask_share", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name != "aspect" and high > 1):
                raise ValueError(
                    f"crops.{name} must be (least, largest), above 0 and for shares up to 1, got {low, high}"
                )
        if not 0 <= self.jitter < 1 or not 0 <= self.mask_probability <= 1:
            raise ValueError(
                f"crops: jitter must lie in 0..1 (exclusive) and mask_probability in 0..1, got {self.jitter} and "
                f"{self.mask_probability}"
            )


@dataclass(slots=True, kw_only=True)
class CropBatch:
    """Crops of images, and what of them the student does not see."""

    globals: Tensor  # [G,n,C,S,S] uint8
    locals: Tensor  # [L,n,C,s,s] uint8
    masked: Tensor  # [G,n,P] bool, True where a patch of a global crop is hidden
    sample_ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CropBatch:
        """Lightning moves anything that has this method."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in values.items()}
        return CropBatch(**moved)


class CropBatches(Dataset[CropBatch]):
    """`batches[step]` are crops of every image of a planned step's samples."""

    def __init__(self, mixture: Mixture, recipe: CropRecipe, patch_size: int, seed: int):
        self.mixture, self.recipe, self.patch_size, self.seed = mixture, recipe, patch_size, seed

    def __getitem__(self, step: Step) -> CropBatch:
        skipped = list(step.skipped)
        ids: list[str] = []
        sources: list[str] = []
        cut: list[tuple[list[Tensor], list[Tensor], Tensor]] = []
        for draw in (draw for row in step.rows for draw in row):
            shard, index = self.mixture.place(draw)
            try:
                sample = shard.read(index)
                if not sample.images:
                    raise ValueError(f"sample {sample.id!r} has no image to cut")
            except (ValueError, OSError) as error:
                skipped.append(f"{draw[0]}/{shard.key(index)}: {error}")
                continue
            for k, image in enumerate(sample.images):
                cut.append(crops_of(image, self.recipe, self.patch_size, generator_of(self.seed, draw, k)))
                ids.append(sample.id)
                sources.append(draw[0])
        return self._stack(cut, ids, sources, skipped)

    def _stack(
        self,
        cut: list[tuple[list[Tensor], list[Tensor], Tensor]],
        ids: list[str],
        sources: list[str],
        skipped: list[str],
    ) -> CropBatch:
        recipe, num_patches = self.recipe, (self.recipe.global_size // self.patch_size) ** 2

        def stacked(crops: list[list[Tensor]], num: int, side: int) -> Tensor:
            if not crops or not num:
                return torch.zeros(num, len(crops), 3, side, side, dtype=torch.uint8)
            return torch.stack([torch.stack(own) for own in crops], dim=1)

        masks = [mask for _, _, mask in cut]
        none = torch.zeros(recipe.num_global, 0, num_patches, dtype=torch.bool)
        return CropBatch(
            globals=stacked([whole for whole, _, _ in cut], recipe.num_global, recipe.global_size),
            locals=stacked([part for _, part, _ in cut], recipe.num_local, recipe.local_size),
            masked=torch.stack(masks, dim=1) if masks else none,
            sample_ids=ids,
            sources=sources,
            skipped=skipped,
        )


def generator_of(seed: int, draw: Draw, image: int = 0) -> torch.Generator:
    """Random numbers of one image at one place of an endless run."""
    name, number = draw
    return torch.Generator().manual_seed(mix(seed, crc32(name.encode()), number, image) >> 1)


def crops_of(
    image: Image.Image, recipe: CropRecipe, patch_size: int, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Global crops G x [C,S,S] and local crops L x [C,s,s], uint8, and hidden patches [G,P] bool."""
    pixels = torch.from_numpy(pixels_of(image.convert("RGB"))).permute(2, 0, 1)  # [C,H,W]
    wholes = [
        _jittered(_crop(pixels, recipe.global_size, recipe.global_scale, recipe.aspect, generator), recipe, generator)
        for _ in range(recipe.num_global)
    ]
    parts = [
        _jittered(_crop(pixels, recipe.local_size, recipe.local_scale, recipe.aspect, generator), recipe, generator)
        for _ in range(recipe.num_local)
    ]
    side = recipe.global_size // patch_size
    masks = []
    for _ in range(recipe.num_global):
        hides = _uniform(generator, (0.0, 1.0)) < recipe.mask_probability
        num = round(_uniform(generator, recipe.mask_share) * side * side)
        masks.append(hidden_blocks(side, num if hides else 0, generator).flatten())
    return wholes, parts, torch.stack(masks)


def hidden_blocks(side: int, num_hidden: int, generator: torch.Generator, num_tries: int = 20) -> Tensor:
    """[side,side] bool with exactly `num_hidden` True: random rectangles (iBOT), then single patches for the rest."""
    hidden = torch.zeros(side, side, dtype=torch.bool)
    for _ in range(num_tries):
        left = num_hidden - int(hidden.sum())
        if left < 4:
            break
        area, aspect = _uniform(generator, (4.0, left)), _uniform(generator, (0.3, 1 / 0.3))
        height = min(side, max(1, round(math.sqrt(area * aspect))))
        width = min(side, max(1, round(math.sqrt(area / aspect))))
        y, x = _integer(generator, side - height + 1), _integer(generator, side - width + 1)
        tried = hidden.clone()
        tried[y : y + height, x : x + width] = True
        if int(tried.sum()) <= num_hidden:
            hidden = tried
    left = num_hidden - int(hidden.sum())
    if left > 0:
        free = (~hidden).flatten().nonzero().squeeze(1)
        chosen = free[torch.randperm(len(free), generator=generator)[:left]]
        hidden.view(-1)[chosen] = True
    return hidden


def _crop(pixels: Tensor, size: int, scale: Pair, aspect: Pair, generator: torch.Generator) -> Tensor:
    """A random part of [C,H,W], resized to [C,size,size]: bilinear, antialiased."""
    height, width = pixels.shape[1:]
    area = height * width * _uniform(generator, scale)
    ratio = math.exp(_uniform(generator, (math.log(aspect[0]), math.log(aspect[1]))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    y, x = _integer(generator, height - h + 1), _integer(generator, width - w + 1)
    part = pixels[:, y : y + h, x : x + w][None].float()
    return interpolate(part, size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def _jittered(pixels: Tensor, recipe: CropRecipe, generator: torch.Generator) -> Tensor:
    """[C,S,S] floats from 0 to 255 -> uint8, with brightness, contrast and saturation changed a little."""
    if recipe.jitter:
        brightness, contrast, saturation = (
            _uniform(generator, (1 - recipe.jitter, 1 + recipe.jitter)) for _ in range(3)
        )
        pixels = pixels * brightness
        grey = sum(channel * share for channel, share in zip(pixels, GREY, strict=True))  # [S,S]
        assert isinstance(grey, Tensor)
        mean = grey.mean()
        pixels = (pixels - mean) * contrast + mean
        grey = (grey - mean) * contrast + mean
        pixels = grey + (pixels - grey) * saturation
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _uniform(generator: torch.Generator, between: Pair) -> float:
    low, high = between
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(generator: torch.Generator, end: int) -> int:
    """From 0 to end - 1."""
    return int(torch.randint(end, (), generator=generator))
