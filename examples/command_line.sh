#!/usr/bin/env bash
# The Hessian of a layer from parts, every method side by side, one of them, and the check.
set -euo pipefail
layer="$(dirname "$0")/smollm2"
cuobs hessian "$layer/X.npy" -o H.npz --force
cuobs compare "$layer/W.npy" --hessian H.npz --pattern 2:4 --method sparsegpt --method admm
cuobs prune "$layer/W.npy" --hessian H.npz --pattern 2:4 -o W24.npy --mask-out mask.npy --force
cuobs verify W24.npy --pattern 2:4
