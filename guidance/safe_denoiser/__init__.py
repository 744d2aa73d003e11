"""Safe Denoiser (Kim et al., "Training-Free Safe Denoisers for Safe Use of Diffusion Models", NeurIPS 2025).

The theorem: if the data are a mixture of safe and unsafe images, the posterior mean of the safe part is

    E_safe = E_data + beta* (E_data - E_unsafe),    beta* = pi / (1 - pi),    pi = P(unsafe | x_t)

(Eq. 4 and 5). E_data is the model's denoised prediction. E_unsafe is the posterior mean over a negation set
of reference latents z_n under the forward kernel q(x_t | z_n) = N(signal z_n, noise^2 I), a softmax-weighted
mean (Eq. 6).

beta* is a ratio of densities in thousands of dimensions: it is zero or infinite except near a reference. The
ways to compare a prediction with a negation set differ in what they put in its place. Each is a `Comparison`
(`interface.py`) in a module of its own, and `choice.py` chooses one from the mode and from what the set's
masks say:

    exact.py         the likelihood ratio as the paper defines it
    tempered.py      its logarithm divided by a constant, so that it acts further away from a reference
    whole_image.py   calibrated mode: the similarity to whole images, with a threshold estimated from the set
    local.py         calibrated mode, for a subject that masks mark: P(unwanted | window) at every position
    style.py         calibrated mode, for a style: P(style | window) at every position
    official.py      the change that the authors' code makes, without the noise that the code then adds

All of them return a change of the denoised prediction, and none draws random numbers.
"""
