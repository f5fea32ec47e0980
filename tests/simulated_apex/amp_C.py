"""Simulated kernel over lists of gradients, weights, first and second moments, all float32 on one device."""


def multi_tensor_adam(chunk, overflow, lists, lr, beta1, beta2, eps, step, decoupled, corrected, decay):
    assert decoupled == 1, "AdamW"
    first, second = (1 - beta1**step, 1 - beta2**step) if corrected else (1, 1)
    for gradient, weight, mean, square in zip(*lists, strict=True):
        mean.copy_(beta1 * mean + (1 - beta1) * gradient)
        square.copy_(beta2 * square + (1 - beta2) * gradient * gradient)
        weight.sub_(lr * (mean / first / ((square / second).sqrt() + eps) + decay * weight))
