import amp_C
import torch

from apex.multi_tensor_apply import multi_tensor_applier


class FusedAdam(torch.optim.Optimizer):
    """Counts steps per group, and assumes a nonempty state holds both moments."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, use_master=False,
    ):  # fmt: skip
        assert not (amsgrad or capturable or use_master) and set_grad_none
        super().__init__(
            params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        )
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.calls = 0

    def zero_grad(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        assert (closure, grads, output_params, scale, grad_norms, grad_scaler) == (None,) * 6
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in with_gradient:
                if not self.state[parameter]:
                    self.state[parameter] |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            lists = [
                [parameter.grad for parameter in with_gradient], with_gradient,
                *([self.state[parameter][name] for parameter in with_gradient] for name in ("exp_avg", "exp_avg_sq")),
            ]  # fmt: skip
            self.calls += 1
            multi_tensor_applier(
                amp_C.multi_tensor_adam, torch.zeros(1, dtype=torch.int), lists, group["lr"], *group["betas"], group["eps"],
                group["step"], self.adam_w_mode, int(group["bias_correction"]), group["weight_decay"],
            )  # fmt: skip
