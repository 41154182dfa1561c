"""The template of model cards. Installed as modeling_vwlmm.hub_card, see setup.py."""
