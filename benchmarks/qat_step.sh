#!/bin/sh
# sh benchmarks/qat_step.sh [OUT]: everything that benchmarks/qat_step.py measures and the GPU tests of what it measures,
# in 300 s on a machine with one H100 and 16 cores: all variants compile first, side by side, into caches on disk, next
# to what is not timed; then one at a time is timed, what matters most first. Parts that run out of time are cut.
# For torchao's rows: pip install torchao==0.18.0 (for torch 2.11). From the repository root.
out=${1:-runs/qat_step}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
export TORCHINDUCTOR_CACHE_DIR="$out/inductor" TRITON_CACHE_DIR="$out/triton"
start=$(date +%s)
say() { echo "=== $(($(date +%s) - start)) s: $*"; }
step="python3 -m benchmarks.qat_step --traced"
warm() { timeout 100 $step --repeats 0 --modes compiled --out "$out/warm" "$@" >>"$out/warm.log" 2>&1; say "compiled $*"; }
tests() { timeout 60 python3 -P -m pytest -q -m gpu -p no:cacheprovider --show-capture=no "$@" 2>&1 | tail -40 | cut -c1-250; }

say "compiling, losses, tests"
warm --parts language --variants plain qat &
warm --parts vision --variants qat &
warm --parts vision --variants plain &
warm --parts language --variants torchao "LSQ in torch" &
timeout 100 $step --parts losses --out "$out" >"$out/losses.log" 2>&1 &
files="tests/test_traced.py tests/test_product.py tests/test_fake_quant.py tests/test_dynamic.py tests/test_round_dynamic.py"
large=tests/test_fake_quant.py::test_offsets_past_2_31_on_gpu
tests $files --maxfail=6 --deselect $large
wait
tests $large
tail -12 "$out/losses.log"
say language
timeout 75 $step --profile --parts language --variants plain qat --modes compiled eager --out "$out"
say language, with more computed again
more="realize_reads_threshold=8 realize_opcount_threshold=100"
timeout 40 $step --parts language --variants plain qat --modes compiled --inductor $more --out "$out/more"
say vision
timeout 40 $step --profile --parts vision --modes eager --out "$out"
timeout 60 $step --profile --parts vision --modes compiled --out "$out/compiled"
say kernels
timeout 30 $step --parts kernels --out "$out"
say peers
timeout 60 $step --repeats 6 --parts language --modes compiled eager --out "$out/peers"
say end
