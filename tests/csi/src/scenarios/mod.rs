//! The scenarios, each named by what must hold.

mod contract;
mod failover;
mod filesystems;
mod placement;
mod snapshots;

use std::future::Future;
use std::pin::Pin;

use crate::Outcome;
use crate::cluster::Cluster;

/// What a scenario needs of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// Root, FUSE and loop devices.
    Devices,
}

type Run = for<'c> fn(&'c Cluster) -> Pin<Box<dyn Future<Output = Outcome<()>> + 'c>>;

/// A scenario.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it needs.
    pub needs: Needs,
    /// Runs it.
    pub run: Run,
}

macro_rules! scenarios {
    ($($needs:ident $module:ident::$name:ident,)*) => {
        /// All of them.
        pub const SCENARIOS: &[Scenario] = &[
            $(Scenario {
                name: stringify!($name),
                needs: Needs::$needs,
                run: |cluster| Box::pin($module::$name(cluster)),
            },)*
        ];
    };
}

scenarios! {
    Nothing contract::sizes_are_rounded_and_bounded,
    Nothing contract::a_name_is_taken_or_the_same_volume,
    Nothing contract::parameters_are_refused_by_name,
    Nothing contract::publishing_is_for_one_node_at_a_time,
    Nothing contract::deletion_is_of_ids_and_not_of_what_is_in_use,
    Nothing contract::lists_have_pages,
    Nothing contract::what_is_not_built_says_so,
    Nothing contract::two_calls_at_once_make_one_volume,
    Nothing placement::requisite_and_preferred_place_the_replicas,
    Nothing placement::a_retry_from_another_node_finds_the_volume,
    Nothing placement::accessible_topology_is_what_access_from_says,
    Nothing placement::capacity_is_what_can_be_made,
    Nothing snapshots::a_snapshot_is_one_by_its_name,
    Nothing snapshots::snapshots_are_listed_in_pages_and_by_what_they_are_of,
    Nothing snapshots::a_copy_says_what_it_began_with_and_is_refused_if_it_cannot_be,
    Devices filesystems::data_outlives_staging,
    Devices filesystems::a_raw_block_volume_keeps_its_data,
    Devices filesystems::foreign_data_is_never_formatted,
    Devices filesystems::volumes_grow_while_they_are_used,
    Devices filesystems::read_only_is_read_only,
    Devices filesystems::one_path_unless_several_are_asked_for,
    Devices filesystems::two_stages_at_once_do_not_disturb_each_other,
    Devices snapshots::a_mounted_volume_is_copied_while_it_is_written,
    Devices failover::a_volume_attached_elsewhere_names_its_holder,
    Devices failover::a_dead_mount_is_replaced,
    Devices failover::a_killed_node_is_fenced_and_the_data_is_elsewhere,
    Devices failover::io_goes_on_without_the_driver,
}
