"""`EmojiCLIP`: two trained projections on frozen encoders, as one dual encoder with the methods of CLIP's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring import backbones


class EmojiCLIP(nn.Module, PyTorchModelHubMixin):
    """Unit features of images and texts in one space, from EfficientNet-Lite0 and MiniLM.

    The encoders are frozen and not part of the weights: they come from their own packages (`shoestring.backbones`)
    when first needed; ImportError names the package if it is missing.

    Parameters
    ----------
    dim : int, default=192
        Features of the common space.
    hidden : int, default=512
        Width of the hidden layer of the images' projection.
    dropout : float, default=0.3
        Of encoder features, in training.

    Attributes
    ----------
    logit_scale : nn.Parameter
        Logarithm of the inverse temperature, as in `transformers.CLIPModel`.
    """

    def __init__(self, dim: int = 192, hidden: int = 512, dropout: float = 0.3) -> None:
        super().__init__()
        self.visual_projection = nn.Sequential(
            nn.LayerNorm(1280), nn.Dropout(dropout), nn.Linear(1280, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )
        self.text_projection = nn.Sequential(nn.LayerNorm(384), nn.Dropout(dropout), nn.Linear(384, dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._encoders: dict[str, backbones.Backbone] = {}

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def get_image_features(self, images: Iterable[Any]) -> Tensor:
        """(n, dim), rows of length 1, of what `shoestring.backbones.Backbone.extract` takes: PIL, arrays, paths."""
        return self.project_images(self._extract("efficientnet-lite0", images))

    def get_text_features(self, texts: Iterable[str]) -> Tensor:
        """(n, dim), rows of length 1."""
        return self.project_texts(self._extract("minilm", texts))

    def project_images(self, features: Tensor) -> Tensor:
        """(n, dim), rows of length 1, of features (n, 1280) of EfficientNet-Lite0."""
        return F.normalize(self.visual_projection(features), dim=1)

    def project_texts(self, features: Tensor) -> Tensor:
        """(n, dim), rows of length 1, of features (n, 384) of MiniLM."""
        return F.normalize(self.text_projection(features), dim=1)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scores (n images, m texts) of encoder features, divided by the temperature."""
        return self.logit_scale.exp() * self.project_images(image_features) @ self.project_texts(text_features).T

    def _extract(self, name: str, items: Iterable[Any]) -> Tensor:
        if name not in self._encoders or self._encoders[name].device != self.device:
            self._encoders[name] = backbones.load(name, device=self.device)
        return torch.from_numpy(self._encoders[name].extract(items)).to(self.device, self.logit_scale.dtype)

    def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
        """As the mixin does, without its template of a model card, which needs jinja."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        had_readme = (folder / "README.md").exists()
        (folder / "README.md").touch()
        try:
            return super().save_pretrained(folder, **options)
        finally:
            if not had_readme:
                (folder / "README.md").unlink()

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, save_directory / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        local_files_only: bool = False,
        revision: str | None = None,
        cache_dir: Any = None,
        force_download: bool = False,
        token: Any = None,
        map_location: str = "cpu",
        strict: bool = True,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> EmojiCLIP:
        file = Path(model_id) / "model.safetensors"
        if not file.parent.is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(
                hf_hub_download(
                    model_id,
                    file.name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and replaced
            model = cls(**options)
        model.load_state_dict(load_file(file, device=str(map_location)), strict=strict)
        return model.to(map_location, dtype).eval()
