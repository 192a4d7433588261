"""How experts are removed.

    evidence     what was measured per MoE layer        (numpy)
    constraints  what a deployment allows
    pruner       evidence + constraints -> plan; the contracts of pruner, criterion and allocation
    plan         which experts stay, by original id     (immutable, JSON)
    trigger      when to prune during training; the contract
    surgery      carries a plan out on a live model and its optimizers   (torch)
    calibration  records evidence on a model and some batches            (torch)

The first five import neither torch nor Lightning: planning from recorded loads takes milliseconds. The callback that
prunes inside a Lightning run is moeprune.training.expert_pruning.
"""
