"""SAEFitter: trains one sparse autoencoder a layer with sae-lens' own training classes.

Legend: d hidden size (the SAE's d_in), F SAE width (d_sae), B tokens of a batch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from bad_neurons.artifacts import digest_path, write_json, written_aside
from bad_neurons.checkpoints import seal_checkpoints
from bad_neurons.errors import UserError
from bad_neurons.formats import SAE, SAE_METRICS
from bad_neurons.ranks import rank_of
from bad_neurons.sae.harvest import ActivationDataModule
from bad_neurons.sae.load import SEAL, layer_folder, load_saes

if TYPE_CHECKING:
    from sae_lens import TopKTrainingSAE


class SAEFitter(L.LightningModule):
    """Top-k sparse autoencoders (arXiv 2406.04093) of several layers, trained side by side.

    Activations are scaled to a mean norm of sqrt(d) for training (Anthropic, April 2024 update), and the scale is folded
    into the weights before saving, so the saved SAE reads raw activations. Several processes share each batch and count together
    which features have fired, so they train what one does with the same batch.

    Args:
        model: which model the activations come from; kept in the SAE's metadata.
        layers: layers to train for.
        out: folder that gets (``fit``) or has (``validate``) one ``layer-<number>`` folder each, as
            ``sae_lens.SAE.load_from_disk`` reads it.
        d_sae: number of features F of one SAE.
        k: features that are active on one token.
        lr: learning rate of Adam; decays linearly to zero over the last fifth.
        dead_after: steps without firing after which a feature counts as dead and is revived by the auxiliary loss.
    """

    def __init__(
        self, model: str, layers: list[int], out: str = "runs/sae", d_sae: int = 2048, k: int = 32, lr: float = 1e-3, dead_after: int = 50
    ) -> None:
        super().__init__()
        if not 0 < k <= d_sae:
            raise UserError(f"--model.k {k}: between 1 and d_sae ({d_sae})")
        self.model, self.layers, self.out, self.d_sae, self.k, self.lr, self.dead_after = (
            model,
            sorted(layers),
            Path(out),
            d_sae,
            k,
            lr,
            dead_after,
        )
        self.saes = nn.ModuleDict()
        self._sums: dict[int, dict[str, Tensor]] = {}
        self.metrics: dict[str, dict[str, float]] = {}

    @override
    def configure_callbacks(self) -> list[Callback]:
        from bad_neurons.callbacks import ExactResume, StopInOrder  # they import a module that imports this one

        return [ExactResume(), StopInOrder()]

    @override
    def setup(self, stage: str) -> None:
        seal_checkpoints(self.trainer)
        if len(self.saes):
            return
        data: ActivationDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        for layer, values in data.training_activations().items():
            scale = 1.0  # a saved SAE reads raw activations
            if stage == "fit":
                scale = values.shape[-1] ** 0.5 / float(values.float().norm(dim=-1).mean())
                self.saes[str(layer)] = self._new_sae(layer, values.float() * scale)
            else:
                self.saes[str(layer)] = load_saes(str(self.out), [layer], values.shape[-1])[layer]
            self.register_buffer(f"scale_{layer}", torch.tensor(scale))
            self.register_buffer(f"silent_{layer}", torch.zeros(self.saes[str(layer)].cfg.d_sae, dtype=torch.long))  # type: ignore[union-attr, arg-type]

    def _new_sae(self, layer: int, scaled: Tensor) -> TopKTrainingSAE:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import SAEMetadata

        metadata = SAEMetadata(model_name=self.model, hook_name=f"layers.{layer}.mlp_to_residual", hook_layer=layer)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=scaled.shape[-1], d_sae=self.d_sae, k=self.k, metadata=metadata))
        with torch.no_grad():
            sae.b_dec.copy_(scaled.mean(0))
        return sae

    @override
    def training_step(self, batch: dict[int, Tensor], batch_idx: int) -> Tensor:
        from sae_lens.saes.sae import TrainStepInput

        total = torch.zeros((), device=self.device)
        fired = []
        for layer, values in batch.items():
            dead = self.get_buffer(f"silent_{layer}") > self.dead_after
            step = self.saes[str(layer)].training_forward_pass(  # type: ignore[operator]
                TrainStepInput(values * self.get_buffer(f"scale_{layer}"), {}, dead, self.global_step, False)
            )
            fired.append((step.feature_acts > 0).any(0).float())
            total = total + step.loss
        return self._over_ranks(total, len(next(iter(batch.values()))), dict(zip(batch, fired, strict=True)))

    def _over_ranks(self, loss: Tensor, tokens: int, fired: dict[int, Tensor]) -> Tensor:
        """Count what fired on any process; gives the loss for this one, so that DDP's mean is that of one process with all tokens.

        sae-lens' losses are means over tokens, the auxiliary one as well, and processes may have one token more or less.
        """
        rank = rank_of(self.trainer)
        here = torch.stack([loss.detach() * tokens, loss.new_tensor(tokens)])
        there = rank.total(torch.cat([here, *fired.values()]))
        for layer, on in zip(fired, there[2:].split(self.d_sae), strict=True):
            self.get_buffer(f"silent_{layer}").add_(1).masked_fill_(on > 0, 0)
        self.log("train/loss", there[0] / there[1] / len(fired), prog_bar=True)
        return loss * (rank.world * tokens / float(there[1])) if rank.world > 1 else loss

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.saes.parameters(), lr=self.lr)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * max(0, steps - step) / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def on_validation_epoch_start(self) -> None:
        self._sums = {layer: {} for layer in self.layers}

    @override
    def validation_step(self, batch: dict[int, Tensor], batch_idx: int) -> None:
        for layer, values in batch.items():
            sae, sums = self.saes[str(layer)], self._sums[layer]
            scaled = values * self.get_buffer(f"scale_{layer}")
            acts = sae.encode(scaled)  # type: ignore[operator]
            centred = scaled - sae.b_dec  # type: ignore[operator]  # near the mean, so the sums below cancel nothing that matters in float32
            parts = {
                "n": torch.tensor(len(values), device=self.device),
                "error": (sae.decode(acts) - scaled).pow(2).sum(),  # type: ignore[operator]
                "sum": centred.sum(0),
                "squares": centred.pow(2).sum(),
                "fired": (acts > 0).sum(0),
            }
            self._sums[layer] = {name: sums.get(name, 0) + part for name, part in parts.items()}

    # Held-out tokens are the only ones kept back, so `test` is `validate`.
    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    @override
    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    @override
    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        total = rank_of(self.trainer).total
        self._sums = {layer: {name: total(part) for name, part in sums.items()} for layer, sums in self._sums.items()}
        self.metrics = {str(layer): self._layer_metrics(layer) for layer in self.layers}
        for layer, row in self.metrics.items():
            self.log_dict({f"val/{name}/layer_{layer}": value for name, value in row.items()}, sync_dist=True)

    def _layer_metrics(self, layer: int) -> dict[str, float]:
        sums = self._sums[layer]
        silent = self.get_buffer(f"silent_{layer}") > self.dead_after
        variance = sums["squares"] - sums["sum"].pow(2).sum() / sums["n"]
        return {
            "variance_explained": 1.0 - float(sums["error"] / variance),
            "l0": float(sums["fired"].sum() / sums["n"]),
            "dead_features": float(((sums["fired"] == 0) & silent).float().mean()),
        }

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["metrics"] = self.metrics

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.metrics = checkpoint.get("metrics", {})

    @override
    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            origin = self.trainer.datamodule.origin  # type: ignore[attr-defined]
            for layer in self.layers:
                save_sae(self.saes[str(layer)], float(self.get_buffer(f"scale_{layer}")), layer_folder(self.out, layer), origin)
            write_json(self.out / "metrics.json", {"format": SAE_METRICS, "layers": self.metrics})


def save_sae(sae: Any, scale: float, folder: Path, origin: Mapping[str, str] | None = None) -> None:
    """Save an SAE for raw activations: scale folded in, decoder rows of norm one. ``sae`` itself stays as it is.

    Beside sae-lens' files lies ``seal.json`` with their digests, which loading checks, and ``origin``: digests of what it was made from.
    """
    from sae_lens.constants import SAE_CFG_FILENAME

    plain = copy.deepcopy(sae).cpu().float()
    plain.fold_activation_norm_scaling_factor(scale)
    plain.fold_W_dec_norm()
    with written_aside(folder) as aside:
        plain.save_inference_model(aside)
        config = aside / SAE_CFG_FILENAME  # sae-lens writes parts of it in the order of a set, which changes from process to process
        config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")), indent=2, sort_keys=True), encoding="utf-8")
        files = {file.name: digest_path(file) for file in sorted(aside.iterdir())}
        write_json(aside / SEAL, {"format": SAE, "inputs": dict(origin or {}), "files": files})
