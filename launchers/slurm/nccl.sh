# Optional advice for NCCL; every line can be overridden from outside. Not needed on one node.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# turn a lost rank into an error of the others instead of an endless wait
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# stacks of the last collectives when one times out
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}  # before torch 2.9: TORCH_NCCL_TRACE_BUFFER_SIZE
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# several interfaces: name the one that the nodes share, e.g. export NCCL_SOCKET_IFNAME=ib0
