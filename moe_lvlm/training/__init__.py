"""Training: stages, the loop, optimizer groups, state, log. (`moe_lvlm.train` is the function that runs it.)"""
