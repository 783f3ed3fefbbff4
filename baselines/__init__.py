"""The rivals: one file a policy. Nothing in mikv imports them; the YAML files of conf/policy name them."""
