#!/bin/bash
# Two machines with eight cards each under Slurm: `sbatch nbs/presets/accelerate/slurm.sh`. Change what is in capitals.
#SBATCH --job-name=scilm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1            # one launcher for each machine, which starts a process for each card
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120              # two minutes before the end: a step is finished, a checkpoint written
#SBATCH --requeue                      # what was done is kept, so the same job goes on

export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HF_HUB_OFFLINE=1                # models and papers were loaded before, on a machine that reaches the Hub
source /SHARED/venv/bin/activate

# The folder after -o must be the same on all machines: on a disk that they share.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch \
    --config_file /SHARED/scilm_adapt/nbs/presets/accelerate/ddp.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((8*SLURM_NNODES))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$FIRST" --main_process_port 29500 \
    -m scilm_adapt run -f h200 -p papers /SHARED/papers.jsonl.gz -o /SHARED/outputs/mine'
