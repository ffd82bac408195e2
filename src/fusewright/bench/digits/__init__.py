"""Seven tasks on real handwritten digits, and a small vision transformer with one expert for each.

A suite that trains in seconds on two cores and still behaves as foundation models do: one
well-trained base; frozen heads from one labelled image a class, as a text encoder would give
them; experts a few small steps away, each towards its own task. ``tasks`` holds the data,
``model`` the network, ``train`` how everything was trained, ``store`` the trained models on
disk, ``evaluate`` the outcomes.
"""
