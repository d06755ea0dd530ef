"""`python -m fedgraft`, for launchers: `torchrun --nproc-per-node 8 -m fedgraft pretrain ...`."""

from fedgraft.cli.main import main

main()
