# shellcheck shell=bash
# Environment of a rank on NVIDIA GPUs; sourced by local.sh and slurm.sbatch. What is already set
# stays, so that a cluster or an experiment can say otherwise.

# One hardware queue: kernels start in the order they were issued, so a tensor or context parallel
# transfer launched before a GEMM runs under it. The overlap flags rely on it on Hopper.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# Experts get another number of tokens every step; growing segments instead of hunting for a block
# of the right size keeps that from fragmenting the memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# NVLink SHARP takes GPU memory for every communicator, folding makes many of them, and the
# all-to-all of the experts cannot use it.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

# Ranks of a node share its cores. Host threads only feed the GPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
