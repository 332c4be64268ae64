"""Performance measures: arrays in, numbers out. Undefined values are None with a reason.

::

    froc          CAMELYON16: lesions, detections, FROC
    kappa         CAMELYON17, PANDA: grades, stages, quadratic weighted kappa
    roc           areas under curves, thresholds, sensitivity and specificity
    compare       two readers of the same cases: DeLong, McNemar
    calibration   Brier, reliability, intercept and slope, net benefit
    overlap       Dice, IoU, Hausdorff
    bootstrap     intervals over patients
"""
