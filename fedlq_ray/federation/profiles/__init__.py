"""Bandwidth, latency and compute of clients: shipped populations, or a user's own CSV file."""

from fedlq_ray.federation.profiles.population import DeviceClass, Profile, load_profiles, populations

__all__ = ["DeviceClass", "Profile", "load_profiles", "populations"]
