#!/usr/bin/env bash
# liger-kernel 0.8.5: the gradient of cross entropy is the logits themselves where their last dimension is not contiguous.
#
# The kernel writes the gradient over the logits if they require one. Logits whose last stride is not 1 are copied first,
# inside an autograd function, so that the copy requires none: nothing is written, and the backward hands out what lies
# there, the logits. The loss is right. Shown under Triton's interpreter, on a CPU.
#
# Seen: logits (5, 33) stored by columns: the gradient equals the logits (norm 13.0); stored by rows it is right (0.44).
# Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy triton==3.8.0 liger-kernel==0.8.5
cat > "$work/run.py" <<'PY'
import sys

import torch
import torch.nn.functional as F
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

torch.manual_seed(0)
logits = torch.randn(5, 33)
target = torch.randint(33, (5,))


def liger(x, y):
    return LigerCrossEntropyFunction.apply(x, y, None)[0]


seen = {}
for name, stored in (("by rows", logits), ("by columns", logits.T.contiguous().T)):
    found = []
    for loss_of in (liger, F.cross_entropy):
        leaf = stored.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = loss_of(leaf * 1.0, target)
        loss.backward()
        found.append((loss.item(), leaf.grad))
    (loss, grad), (true_loss, true_grad) = found
    seen[name] = (abs(loss - true_loss) < 1e-5, torch.allclose(grad, true_grad, atol=1e-6), torch.equal(grad, logits))
    print(f"{name}: loss {loss:.6f} ({true_loss:.6f}), norm of the gradient {grad.norm():.3f} ({true_grad.norm():.3f})")
print({name: dict(zip(("loss right", "gradient right", "gradient is the logits"), v)) for name, v in seen.items()})
sys.exit(seen != {"by rows": (True, True, False), "by columns": (True, False, True)})
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/run.py"
