#!/usr/bin/env bash
# What only a GPU can show, in ten minutes: the kernels' tests, then the benchmarks.
#
#     [PYTHON=python3] benchmarks/run_gpu.sh
#
# Writes benchmarks/results/<name of the GPU>/. A part that fails does not stop the others; the exit status tells.
# Without the OpenMMLab stack, what needs torch and Triton only.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || { echo 'no CUDA device' >&2; exit 1; }
out=benchmarks/results/$(tr '[:upper:]' '[:lower:]' <<< "$gpu" | tr -cs '[:alnum:]\n' '_')
mkdir -p "$out"
failed=()

part() {  # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "=== $name, at most $seconds s"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
}

benchmark() {  # benchmark NAME SECONDS TOOL OPTIONS...
    part "$1" "$2" "$python" -W ignore "tools/analysis_tools/benchmark_$3.py" --out "$out/$1.json" "${@:4}"
}

check_kernels() {
    "$python" -W ignore - <<'PYTHON'
import torch
from adala_mm.ops import linear_attention_packed, linear_attention_reference

for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.005)):
    for n, dim in ((1, 64), (197, 64), (4097, 64), (1025, 80), (16385, 128)):
        qkv = torch.randn(2, n, 3, 4, dim, device='cuda', dtype=dtype, requires_grad=True)
        exact = qkv.detach().double().requires_grad_()
        out = linear_attention_packed(qkv)
        wanted = linear_attention_reference(*exact.permute(2, 0, 3, 1, 4)).transpose(1, 2)
        upstream = torch.randn_like(out)
        pairs = [(out, wanted), (torch.autograd.grad(out, qkv, upstream)[0],
                                 torch.autograd.grad(wanted, exact, upstream.double())[0])]
        errors = [float((got - right).norm() / right.norm()) for got, right in pairs]
        print(f'{dtype}, {n} tokens, {dim} channels: relative errors {errors[0]:.1e}, {errors[1]:.1e}')
        assert max(errors) < bound
PYTHON
}
export -f check_kernels
export python

# flash_bla and fla are left to calls by hand: their kernels tune themselves for minutes at each length.
cores=(--batch 8 --heads 16 --tokens 256 1024 4096 16384 65536 --seconds 0.5
       --competitors sdpa math ours plain compiled)
if "$python" -c 'import mmengine, mmcv, mmseg, timm' 2> /dev/null; then
    part tests 120 "$python" -m pytest -q tests/test_gpu.py
    benchmark attention 100 attention "${cores[@]}"
    benchmark model 150 model --arch L --sizes 256 512 1024 2048 --dtype fp32 bf16 --best-batch --seconds 0.5 \
        --time-limit 3
    benchmark model_compiled 90 model --arch L --sizes 512 1024 --dtype bf16 --compile --seconds 0.5
    benchmark training 130 training --arch B --size 512 --batch 8 --dtype fp32 bf16 --depths 12 24 --seconds 3
else
    echo 'OpenMMLab stack not found: kernels and attention core only'
    part tests 120 bash -c check_kernels
    benchmark attention 100 attention "${cores[@]}"
fi

echo "=== results in $out"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
