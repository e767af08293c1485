"""DeepSpeed's pipeline engine with schedules for a frozen backbone. The only place that knows its insides."""
